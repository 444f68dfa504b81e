// A round of the search for a start: every component is split, EM steps, pairs are merged until as many are left as before, and EM
// steps; as fitting/rounds.py does with models/merging.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "interface.hpp"
#include "pairs.hpp"
#include "share.hpp"
#include "steps.hpp"

namespace rounds {

// Pairs times squared dimensions from which another thread saves time.
constexpr double PARALLEL = 50000;

// Steps of some components, whose tables belong to this object.
struct Climb {
  const StepCall& given;
  StepCall call;
  const int64_t K, D, E, P;
  std::vector<double> logits, means, logs, upper, counts, total, cost, prior, drift;

  Climb(const StepCall& given, int64_t K, int64_t steps, double tolerance)
      : given(given), call(given), K(K), D(given.sweep.dimensions), E(given.sweep.family == SPHERICAL ? 1 : D),
        P(given.sweep.family == FULL ? D * (D - 1) / 2 : 0), logits((steps + 1) * K), means((steps + 1) * K * D),
        logs((steps + 1) * K * E), upper((steps + 1) * K * P), counts((steps + 1) * K, NAN), total(steps), cost(steps), prior(steps),
        drift(steps + 1) {
    call.sweep.components = K, call.steps = steps, call.tolerance = tolerance;
    call.logits = logits.data(), call.means = means.data(), call.log_diagonal = logs.data(), call.upper = upper.data();
    call.counts = counts.data(), call.total = total.data(), call.cost = cost.data(), call.prior = prior.data(), call.drift = drift.data();
  }

  // Sets the first covariance k of the family; false if it is singular.
  bool set(int64_t k, const double* spread, const Kernel& kernel, std::vector<double>& space) {
    if (given.sweep.family != FULL) {
      for (int64_t e = 0; e < E; e++) {
        if (!(spread[e] > 0)) return false;
        logs[k * E + e] = -0.5 * std::log(spread[e]);
      }
      return true;
    }
    double *matrix = space.data(), *inverse = matrix + D * D, *to = upper.data() + k * P;
    std::copy_n(spread, D * D, matrix);
    if (!kernel.invert(matrix, inverse, D, 4 * D * std::numeric_limits<double>::epsilon())) return false;
    for (int64_t i = 0; i < D; i++) {
      logs[k * D + i] = std::log(inverse[i * D + i]);
      for (int64_t j = i + 1; j < D; j++) *to++ = inverse[j * D + i];
    }
    return true;
  }

  // The covariance of a component before step t, in the shape of S2.
  void get(int64_t t, int64_t k, double* spread, std::vector<double>& space) const {
    const double *diagonal = &logs[(t * K + k) * E], *from = upper.data() + (t * K + k) * P;
    if (given.sweep.family != FULL) {
      for (int64_t e = 0; e < E; e++) spread[e] = std::exp(-2 * diagonal[e]);
      return;
    }
    // V = U^-1 by rows from the last one on; the covariance is V'V.
    double *V = space.data(), *U = V + D * D;
    for (int64_t i = 0; i < D; i++) {
      U[i * D + i] = std::exp(diagonal[i]);
      for (int64_t j = i + 1; j < D; j++) U[i * D + j] = *from++;
    }
    for (int64_t i = D - 1; i >= 0; i--) {
      double* row = V + i * D;
      std::fill(row, row + D, 0.0);
      for (int64_t l = i + 1; l < D; l++) for (int64_t j = l; j < D; j++) row[j] -= U[i * D + l] * V[l * D + j];
      for (int64_t j = i + 1; j < D; j++) row[j] /= U[i * D + i];
      row[i] = 1 / U[i * D + i];
    }
    std::fill(spread, spread + D * D, 0.0);
    for (int64_t r = 0; r < D; r++) for (int64_t i = r; i < D; i++) for (int64_t j = r; j < D; j++)
      spread[i * D + j] += V[r * D + i] * V[r * D + j];
  }

  // Performs the steps; false if one of them was not an ordinary one.
  template <class Evaluate> bool run(const Kernel& kernel, Evaluate evaluate, Status& status) {
    bool ended = false;
    status = steps::run(call, kernel, evaluate, &ended);
    return status == DONE && ended && call.done > 0;
  }
};

// Both halves of component k of ``from``, the first table of ``into``; false if one is singular.
inline bool split(const RoundCall& call, const Climb& from, Climb& into, const Kernel& kernel) {
  const int64_t K = from.K, D = from.D, size = call.steps.sweep.family == FULL ? D * D : from.E;
  const bool full = call.steps.sweep.family == FULL;
  std::vector<double> spread(size), axis(D), space(full ? 2 * D * D : 0), axes(full ? D * D : 0);
  for (int64_t k = 0; k < K; k++) {
    from.get(0, k, spread.data(), space);
    std::fill(axis.begin(), axis.end(), 0.0);
    if (full) {
      std::vector<double> values(spread);
      kernel.eigenvectors(values.data(), axes.data(), D);
      int64_t longest = 0, entry = 0;
      for (int64_t d = 1; d < D; d++) if (values[d * D + d] > values[longest * D + longest]) longest = d;
      const double *vector = &axes[longest * D], length = std::sqrt(std::max(0.0, values[longest * D + longest]));
      for (int64_t d = 1; d < D; d++) if (std::abs(vector[d]) > std::abs(vector[entry])) entry = d;
      for (int64_t d = 0; d < D; d++) axis[d] = call.half * (vector[entry] < 0 ? -length : length) * vector[d];
      for (int64_t i = 0; i < D; i++) for (int64_t j = 0; j < D; j++) spread[i * D + j] -= axis[i] * axis[j];
    } else {
      int64_t longest = call.steps.sweep.family == SPHERICAL ? k % D : 0;
      if (call.steps.sweep.family == DIAGONAL) for (int64_t d = 1; d < D; d++) if (spread[d] > spread[longest]) longest = d;
      double& variance = spread[from.E == 1 ? 0 : longest];
      axis[longest] = call.half * std::sqrt(variance);
      variance -= axis[longest] * axis[longest] / (call.steps.sweep.family == SPHERICAL ? D : 1);
    }
    for (int64_t side = 0; side < 2; side++) {
      const int64_t at = side * K + k;
      if (!into.set(at, spread.data(), kernel, space)) return false;
      into.logits[at] = from.logits[k] - std::log(2.0);
      for (int64_t d = 0; d < D; d++) into.means[at * D + d] = from.means[k * D + d] + (side ? -axis[d] : axis[d]);
    }
  }
  return true;
}

// Merges components of ``from`` before step t, the cheapest pairs first, until those of ``into`` are left.
inline bool merge(const RoundCall& call, const Climb& from, int64_t t, Climb& into, const Kernel& kernel) {
  const int64_t n = from.K, D = from.D;
  const bool full = call.steps.sweep.family == FULL;
  const int64_t size = full ? D * D : from.E;
  std::vector<double> weights(n), means(&from.means[t * n * D], &from.means[t * n * D] + n * D), spreads(n * size), space(full ? 2 * D * D : 0);
  double largest = -INFINITY, sum = 0;
  for (int64_t k = 0; k < n; k++) largest = std::max(largest, from.logits[t * n + k]);
  for (int64_t k = 0; k < n; k++) sum += weights[k] = std::exp(from.logits[t * n + k] - largest);
  for (double& w : weights) w /= sum;
  for (int64_t k = 0; k < n; k++) from.get(t, k, &spreads[k * size], space);
  PairCall pair{full, call.steps.sweep.family == SPHERICAL, 1, 0, n, D, from.E, 0, call.blocks,
                weights.data(), means.data(), spreads.data(), call.points, nullptr, nullptr};
  std::vector<pairs::Component> components(n);
  pairs::Worker worker(pair, &components);
  std::vector<int64_t> alive(n);
  std::vector<double> costs(n * n);
  for (int64_t k = 0; k < n; k++) alive[k] = k, worker.prepare(components[k], k);
  const int threads = double(n) * n * D * D > PARALLEL ? call.steps.sweep.threads : 1;
  const Status status = share(threads, size_t(n), [&](size_t i) {
    pairs::Worker own(pair, &components);
    for (int64_t j = i + 1; j < n; j++) costs[i * n + j] = own.cost(i, j);
    return DONE;
  });
  if (status != DONE) throw std::bad_alloc();
  while (int64_t(alive.size()) > into.K) {
    int64_t first = -1, second = -1;
    for (size_t a = 0; a < alive.size(); a++) for (size_t b = a + 1; b < alive.size(); b++)
      if (first < 0 || costs[alive[a] * n + alive[b]] < costs[first * n + second]) first = alive[a], second = alive[b];
    const double W = worker.merge(first, second);
    std::copy(worker.mean.begin(), worker.mean.end(), &means[first * D]);
    std::copy(worker.spread.begin(), worker.spread.end(), &spreads[first * size]);
    weights[first] = W, weights[second] = 0;
    alive.erase(std::find(alive.begin(), alive.end(), second));
    worker.prepare(components[first], first);
    for (int64_t other : alive)
      if (other != first) costs[std::min(first, other) * n + std::max(first, other)] = worker.cost(std::min(first, other), std::max(first, other));
  }
  for (int64_t k = 0; k < into.K; k++) {
    const int64_t from_k = alive[k];
    into.logits[k] = std::log(std::max(weights[from_k], 1e-300));
    std::copy_n(&means[from_k * D], D, &into.means[k * D]);
    if (!into.set(k, &spreads[from_k * size], kernel, space)) return false;
  }
  return true;
}

// The tables of the call hold the mixture in their first rows, which the merged mixture replaces; the second rows become that after
// the steps, of which the last total, cost and prior are known. ``work`` stays zero if a step was not an ordinary one.
template <class Evaluate> Status run(RoundCall& call, const Kernel& kernel, Evaluate evaluate) {
  const StepCall& given = call.steps;
  const int64_t K = given.sweep.components;
  Climb from(given, K, 1, 0), twice(given, 2 * K, call.split_steps + 1, call.split_tolerance), once(given, K, call.merged_steps + 1, call.merged_tolerance);
  const int64_t D = from.D, E = from.E, P = from.P;
  std::copy_n(given.logits, K, from.logits.data()), std::copy_n(given.means, K * D, from.means.data());
  std::copy_n(given.log_diagonal, K * E, from.logs.data()), std::copy_n(given.upper, K * P, from.upper.data());
  call.work = 0;
  Status status = DONE;
  if (!split(call, from, twice, kernel) || !twice.run(kernel, evaluate, status)) return status;
  if (!merge(call, twice, twice.call.done - 1, once, kernel) || !once.run(kernel, evaluate, status)) return status;
  const int64_t t = once.call.done - 1;
  for (int64_t row = 0; row < 2; row++) {
    const int64_t at = row * t;
    std::copy_n(&once.logits[at * K], K, given.logits + row * K), std::copy_n(&once.means[at * K * D], K * D, given.means + row * K * D);
    std::copy_n(&once.logs[at * K * E], K * E, given.log_diagonal + row * K * E);
    std::copy_n(once.upper.data() + at * K * P, K * P, given.upper + row * K * P);
  }
  *given.total = once.total[t], *given.cost = once.cost[t], *given.prior = once.prior[t];
  call.work = 2 * K * twice.call.done + K * once.call.done;
  return DONE;
}

}  // namespace rounds
