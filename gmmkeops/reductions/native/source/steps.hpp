// EM steps of ordinary problems without the interpreter: the M-step of m_step.py without priors but a constant one, for CPUs.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "interface.hpp"
#include "share.hpp"
#include "sums.hpp"

namespace steps {

constexpr double LOG_TWO_PI = 1.8378770664093453;

inline double log_sum_exp(const double* values, int64_t count) {
  double largest = -INFINITY, sum = 0;
  for (int64_t k = 0; k < count; k++) largest = std::max(largest, values[k]);
  for (int64_t k = 0; k < count; k++) sum += std::exp(values[k] - largest);
  return largest + std::log(sum);
}

// The objective before step t as in ordinary.py, without the drift and what is the same for all mixtures, nats per point.
inline double objective(const StepCall& call, int64_t t) {
  return (call.prior[t] - call.total[t] * call.scale) / call.mass + call.cost[t];
}

struct Steps {
  StepCall& call;
  const Kernel& kernel;
  const int64_t K, D, L;          // components, dimensions, covariances
  const int64_t E, P;             // numbers of a covariance in ``log_diagonal`` and in ``upper``
  const bool full, given;         // whether covariances are matrices; whether the sums are those of another engine
  int64_t spread;                 // numbers of a covariance in S2
  std::vector<double> offsets, factor, cost, priors, coarseness, own, center;
  double *S0, *S1, *S2;
  double total = 0, prior = 0, ridges = 0, roundings = 0;  // the latter two: sums of the ridges, and of squared rounding errors

  // The sums are those that another engine has computed, or memory for those of an E-step.
  Steps(StepCall& call, const Kernel& kernel, bool given)
      : call(call), kernel(kernel), K(call.sweep.components), D(call.sweep.dimensions), L(call.tied ? 1 : K),
        E(call.sweep.family == SPHERICAL ? 1 : D), P(call.sweep.family == FULL ? D * (D - 1) / 2 : 0),
        full(call.sweep.family == FULL), given(given), spread(full ? D * D : E),
        offsets(K), factor(L * (full ? D * D : E)), cost(L), priors(L), coarseness(L),
        own(given ? 0 : K * (1 + D + spread)), center(D),
        S0(given ? call.sweep.S0 : own.data()), S1(given ? call.sweep.S1 : S0 + K), S2(given ? call.sweep.S2 : S1 + K * D) {
    if (given) total = *call.sweep.total;
    for (int64_t d = 0; d < D; d++) ridges += call.ridge[d], roundings += call.rounding ? call.rounding[d] * call.rounding[d] : 0;
  }

  // Factors and offsets of the parameters before step t; false if the points are too coarse for them.
  bool prepare(int64_t t) {
    const double* logits = call.logits + t * K;
    const double normalizer = log_sum_exp(logits, K);
    const double work = E * EXPONENTIAL + (full ? 2 * D * D : 4 * D);
    complete(share_ranges(call.sweep.threads, L, work, [&](int64_t first, int64_t last) {
      std::vector<double> along(D);
      for (int64_t l = first; l < last; l++) {
        const double* logs = call.log_diagonal + (t * L + l) * E;
        const double* upper = call.upper + (t * L + l) * P;
        double* U = &factor[l * (full ? D * D : E)];
        double determinant = 0, trace = 0, error = 0;
        if (!full && E == 1) {
          U[0] = std::exp(logs[0]), determinant = double(D) * logs[0];
          trace = U[0] * U[0] * ridges, error = U[0] * U[0] * roundings;
        } else for (int64_t i = 0; i < D; i++) {
          const double u = std::exp(logs[i]);
          determinant += logs[i];
          double norm = u * u;
          if (full) {
            for (int64_t j = 0; j < D; j++) U[i * D + j] = j < i ? 0 : j == i ? u : *upper;
            for (int64_t j = i + 1; j < D; j++) U[i * D + j] = *upper++, norm += U[i * D + j] * U[i * D + j];
          } else U[i] = u;
          trace += norm * call.ridge[i];
          if (call.rounding) error += norm * call.rounding[i] * call.rounding[i];
        }
        cost[l] = 0.5 * trace, coarseness[l] = error;
        priors[l] = call.scatter ? 0.5 * weighted(U, along.data()) - call.degrees * determinant : 0;
        for (int64_t k = l; k < (call.tied ? K : l + 1); k++)
          offsets[k] = call.bare ? logits[k] : logits[k] - normalizer + determinant - 0.5 * D * LOG_TWO_PI;
      }
      return DONE;
    }));
    double coarsest = 0;
    prior = 0;
    for (int64_t l = 0; l < L; l++) prior += priors[l], coarsest = coarseness[l] > coarsest ? coarseness[l] : coarsest;
    for (double value : offsets) if (!(std::abs(value) < 1e30)) return false;
    return coarsest <= call.coarse * call.coarse;
  }

  // The trace of the scatter of the prior times U U'.
  double weighted(const double* U, double* along) {
    double sum = 0;
    if (!full) {
      for (int64_t e = 0; e < E; e++) sum += call.scatter[e] * U[e] * U[e];
      return sum;
    }
    for (int64_t i = 0; i < D; i++) {
      std::fill_n(along, D, 0.0);
      for (int64_t j = 0; j < D; j++) for (int64_t r = j; r < D; r++) along[r] += call.scatter[i * D + j] * U[j * D + r];
      for (int64_t r = i; r < D; r++) sum += U[i * D + r] * along[r];
    }
    return sum;
  }

  // The E-step at the parameters before step t, and their objective, unless the sums are given. ``ordinary`` becomes false if the points
  // are too coarse for the parameters, or if a value is not finite.
  template <class Evaluate> Status expect(int64_t t, Evaluate evaluate, bool& ordinary) {
    ordinary = prepare(t);
    if (!ordinary) return DONE;
    const Status status = given ? DONE : sums_of(t, evaluate);
    if (status != DONE) return status;
    double *counts = call.counts + t * L, ridge = 0;
    if (std::isnan(counts[0])) {
      for (int64_t l = 0; l < L; l++) counts[l] = 0;
      for (int64_t k = 0; k < K; k++) counts[call.tied ? 0 : k] += S0[k] * call.scale / call.mass;
    }
    for (int64_t l = 0; l < L; l++) ridge += counts[l] * cost[l];
    call.total[t] = total, call.cost[t] = ridge, call.prior[t] = prior;
    ordinary = !*call.sweep.odd && std::isfinite(total) && std::isfinite(ridge);
    return DONE;
  }

  // The step from the parameters before step t; ``ordinary`` becomes whether it is an ordinary one.
  template <class Evaluate> Status perform(int64_t t, Evaluate evaluate, bool& ordinary) {
    const Status status = expect(t, evaluate, ordinary);
    ordinary = ordinary && maximize(t);
    return status;
  }

  // The sums of the E-step.
  template <class Evaluate> Status sums_of(int64_t t, Evaluate evaluate) {
    Call sweep = call.sweep;
    sweep.offsets = offsets.data(), sweep.means = call.means + t * K * D, sweep.factor = factor.data(), sweep.center = center.data();
    sweep.factor_stride = call.tied ? 0 : int64_t(factor.size()) / K;
    sweep.S0 = S0, sweep.S1 = S1, sweep.S2 = S2, sweep.total = &total;
    return evaluate(sweep);
  }

  // The M-step to the parameters after step t; false if it is not an ordinary one.
  bool maximize(int64_t t) {
    const double* counts = call.counts + t * L;
    double all = 0, fewest = INFINITY;
    // Only the mean of an empty component is not known; it keeps its value in k-means.
    const bool empty = call.bare && call.fixed_weights && call.fixed_covariances;
    for (int64_t k = 0; k < K; k++) {
      const double s0 = S0[k] * call.scale;
      if (!(s0 > 1e-200 || (empty && s0 == 0)) || !std::isfinite(s0)) return false;
      all += s0, fewest = std::min(fewest, s0);
    }
    if (call.tied) {
      std::vector<double> scatter(spread), space(D + (full ? 2 * D * D : 0));
      for (int64_t k = 0; k < K; k++) move(t, k, scatter.data(), space.data());
      if (!covariance(t, 0, scatter.data(), all, space.data())) return false;
    } else if (fewest <= call.pool_below * call.mass) {
      // The pooled covariance depends on the scatter of all components.
      std::vector<double> scatter(K * spread), number(K), space(D + (full ? 2 * D * D : 0));
      for (int64_t k = 0; k < K; k++) number[k] = S0[k] * call.scale, move(t, k, &scatter[k * spread], space.data());
      if (!pool(call.means + (t + 1) * K * D, scatter, number)) return false;
      for (int64_t k = 0; k < K; k++) if (!covariance(t, k, &scatter[k * spread], number[k], space.data())) return false;
    } else {
      const double work = E * EXPONENTIAL + (full ? D * D * (D + 8) : 8 * D);
      const Status status = share_ranges(call.sweep.threads, K, work, [&](int64_t first, int64_t last) {
        std::vector<double> scatter(spread), space(D + (full ? 2 * D * D : 0));
        for (int64_t k = first; k < last; k++) {
          std::fill(scatter.begin(), scatter.end(), 0.0);
          move(t, k, scatter.data(), space.data());
          // Any status but DONE ends the other threads, too.
          if (!covariance(t, k, scatter.data(), S0[k] * call.scale, space.data())) return INTERRUPTED;
        }
        return DONE;
      });
      if (!complete(status)) return false;
    }
    for (int64_t k = 0; k < K; k++) {
      const double weight = S0[k] * call.scale / all;
      // A small cluster gets the least weight, as in mixture_of in kmeans.py.
      if (!(weight > call.least) && !(call.pool_weight > 0)) return false;
      call.logits[(t + 1) * K + k] = call.fixed_weights ? call.logits[t * K + k] : std::log(std::max(weight, std::max(call.least, 1e-300)));
    }
    double change = 0;
    for (int64_t l = 0; l < L; l++) change += (counts[l] - counts[L + l]) * cost[l];
    call.drift[t + 1] = call.drift[t] + change;
    return true;
  }

  // Adds some points of the pooled covariance to each covariance; false if a typical variance is mere rounding. As mixture_of in
  // kmeans.py: a cluster of large variances counts less, so that the pooled covariance is robust.
  bool pool(const double* centers, std::vector<double>& scatter, std::vector<double>& number) {
    const int64_t parts = call.sweep.family == SPHERICAL ? D : 1;
    std::vector<double> variances(K * E), unit(E), pooled(spread);
    for (int64_t k = 0; k < K; k++) {
      const double *mean = centers + k * D, *own = &scatter[k * spread];
      double largest = 0;
      for (int64_t d = 0; d < D; d++) largest = std::max(largest, std::abs(mean[d]));
      for (int64_t e = 0; e < E; e++) {
        const double size = std::max(1.0, E == 1 ? largest : std::abs(mean[e]));
        const double variance = own[full ? e * D + e : e] / (parts * number[k]);
        // A variance that is mere rounding is zero, as that of equal points in a column.
        variances[k * E + e] = variance > call.floor * size * size ? variance : 0;
      }
    }
    // A typical variance of each column: the weighted median over the clusters.
    std::vector<int64_t> order(K);
    for (int64_t e = 0; e < E; e++) {
      for (int64_t k = 0; k < K; k++) order[k] = k;
      std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return variances[a * E + e] < variances[b * E + e]; });
      double all = 0, below = 0;
      for (int64_t k : order) all += number[k];
      for (int64_t k : order) {
        unit[e] = variances[k * E + e];
        if ((below += number[k]) >= 0.5 * all) break;
      }
      if (!(unit[e] > 0)) return false;
    }
    for (int64_t k = 0; k < K; k++) {
      double size = 0;
      for (int64_t e = 0; e < E; e++) size += variances[k * E + e] / unit[e] / E;
      const double limit = call.pool_limit / std::max(call.pool_limit, size) / call.mass;
      for (int64_t i = 0; i < spread; i++) pooled[i] += limit * scatter[k * spread + i];
    }
    for (int64_t e = 0; e < E; e++) pooled[full ? e * D + e : e] += call.pool_floor * parts * unit[e];
    for (int64_t k = 0; k < K; k++) {
      number[k] += call.pool_weight;
      for (int64_t i = 0; i < spread; i++) scatter[k * spread + i] += call.pool_weight * pooled[i];
    }
    return true;
  }

  // The mean of component k after step t; its scatter about it is added to ``into``. ``shift`` holds D numbers.
  void move(int64_t t, int64_t k, double* into, double* shift) {
    const double *means = call.means + (t * K + k) * D, *s1 = S1 + k * D, *s2 = S2 + k * spread;
    double* next = call.means + ((t + 1) * K + k) * D;
    for (int64_t d = 0; d < D; d++) {
      next[d] = call.fixed_means || S0[k] == 0 ? means[d] : means[d] + s1[d] / S0[k];
      shift[d] = next[d] - means[d];
    }
    if (full)
      for (int64_t i = 0; i < D; i++) for (int64_t j = 0; j < D; j++)
        into[i * D + j] += call.scale * (s2[i * D + j] - s1[i] * shift[j] - shift[i] * s1[j] + S0[k] * shift[i] * shift[j]);
    else if (E == 1)
      into[0] += call.scale * (s2[0] - sum_of(D, [&](int64_t d) { return shift[d] * (2 * s1[d] - S0[k] * shift[d]); }));
    else
      for (int64_t d = 0; d < D; d++) into[d] += call.scale * (s2[d] - shift[d] * (2 * s1[d] - S0[k] * shift[d]));
  }

  // The factor of covariance l after step t, from the scatter of a number of points.
  bool covariance(int64_t t, int64_t l, double* scatter, double number, double* space) {
    number += call.degrees;
    if (call.scatter) for (int64_t i = 0; i < spread; i++) scatter[i] += call.scatter[i];
    call.counts[(t + 1) * L + l] = number / call.mass;
    if (call.fixed_covariances) {
      std::copy_n(call.log_diagonal + (t * L + l) * E, E, call.log_diagonal + ((t + 1) * L + l) * E);
      std::copy_n(call.upper + (t * L + l) * P, P, call.upper + ((t + 1) * L + l) * P);
      return true;
    }
    return full ? factorize(t, l, scatter, number, space) : scales(t, l, scatter, number);
  }

  // Variances to the logarithms of the factors.
  bool scales(int64_t t, int64_t l, const double* scatter, double number) {
    const double ridge = ridges / D;
    for (int64_t e = 0; e < E; e++) {
      const double variance = call.sweep.family == SPHERICAL ? scatter[0] / D / number + ridge : scatter[e] / number + call.ridge[e];
      if (!(variance >= call.floor) || !std::isfinite(variance)) return false;
      call.log_diagonal[((t + 1) * L + l) * E + e] = -0.5 * std::log(variance);
    }
    return true;
  }

  // A covariance to the upper factor U of its inverse U U'. ``space`` holds 2 D D + D numbers.
  bool factorize(int64_t t, int64_t l, const double* scatter, double number, double* space) {
    double *matrix = space, *inverse = space + D * D;
    const double noise = 4 * D * std::numeric_limits<double>::epsilon();
    for (int64_t i = 0; i < D; i++) {
      for (int64_t j = i; j < D; j++) matrix[i * D + j] = 0.5 * (scatter[i * D + j] + scatter[j * D + i]) / number;
      matrix[i * D + i] += call.ridge[i];
      if (!(matrix[i * D + i] >= call.floor)) return false;
    }
    if (!kernel.invert(matrix, inverse, D, noise, space + 2 * D * D)) return false;
    double *logs = call.log_diagonal + ((t + 1) * L + l) * E, *upper = call.upper + ((t + 1) * L + l) * P, size = 0;
    for (int64_t i = 0; i < D; i++) {
      logs[i] = std::log(inverse[i * D + i]);
      for (int64_t j = 0; j <= i; j++) size += inverse[i * D + j] * inverse[i * D + j];
      for (int64_t j = i + 1; j < D; j++) *upper++ = inverse[j * D + i];
    }
    return size <= call.ceiling;
  }
};

}  // namespace steps
