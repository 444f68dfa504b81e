// Accelerated EM: extrapolation from two EM steps, as squarem.py describes it.
#pragma once
#include <algorithm>
#include <cmath>

#include "interface.hpp"
#include "steps.hpp"
#include "tables.hpp"

namespace steps {

// Longest stride of an extrapolation, as in squarem.py.
constexpr double LONGEST_STRIDE = 64;

// An accelerated iteration: two EM steps, an extrapolation from them, and an EM step from there unless it increases the objective; as
// EM._extrapolate in em.py. Reference: squarem.py.
struct Squarem {
  // Rows: the mixture before the iteration, after one and two EM steps, the extrapolated mixture, and the one after an EM step from it.
  enum Row : int64_t { BEFORE, FIRST, SECOND, EXTRAPOLATED, AFTER };

  StepCall& call;
  Tables tables;
  Steps steps;

  Squarem(StepCall& call, const Kernel& kernel) : call(call), tables(call, call.sweep.components, AFTER), steps(tables.call, kernel, false) {}

  // The iteration from row t of the tables of the call; ``ordinary`` becomes whether all of its steps are ordinary ones.
  template <class Evaluate> Status perform(int64_t t, Evaluate evaluate, bool& ordinary) {
    const int64_t L = tables.L;
    tables.load(call, t);
    copy(call.counts, t, tables.counts.get(), BEFORE, L), tables.drift[BEFORE] = call.drift[t];
    Row result = SECOND;
    for (int64_t row : {BEFORE, FIRST}) {
      const Status status = steps.perform(row, evaluate, ordinary);
      if (status != DONE || !ordinary) return status;
    }
    if (value(FIRST) <= value(BEFORE) && extrapolate()) {
      ordinary = is_bounded();
      const Status status = ordinary ? steps.expect(EXTRAPOLATED, evaluate, ordinary) : DONE;
      if (status != DONE || !ordinary) return status;
      if (value(EXTRAPOLATED) <= value(FIRST)) {
        ordinary = steps.maximize(EXTRAPOLATED), result = AFTER;
        if (!ordinary) return DONE;
      }
    }
    tables.store(result, call, t + 1);
    copy(tables.counts.get(), BEFORE, call.counts, t, L), copy(tables.counts.get(), result, call.counts, t + 1, L);
    call.drift[t + 1] = tables.drift[result];
    call.total[t] = tables.total[BEFORE], call.cost[t] = tables.cost[BEFORE], call.prior[t] = tables.prior[BEFORE];
    return DONE;
  }

  // The objective without what is the same for all mixtures, nats per point.
  double value(Row row) const { return objective(tables.call, row) + tables.drift[row]; }

  // Sets the extrapolated mixture; false if the stride is one or a number is not finite. The fractions of the points remain.
  bool extrapolate() {
    const int64_t K = tables.K, L = tables.L;
    const struct { double* numbers; int64_t size; } parts[] = {
        {tables.logits.get(), K}, {tables.means.get(), K * tables.D}, {tables.logs.get(), L * tables.E}, {tables.upper.get(), L * tables.P}};
    for (Row row : {BEFORE, FIRST, SECOND}) {
      double* logits = tables.logits.get() + row * K;
      const double normalizer = log_sum_exp(logits, K);
      for (int64_t k = 0; k < K; k++) logits[k] -= normalizer;
    }
    double change = 0, curvature = 0;
    for (auto& [a, size] : parts) for (int64_t i = 0; i < size; i++) {
      const double r = a[size + i] - a[i], v = (a[2 * size + i] - a[size + i]) - r;
      change += r * r, curvature += v * v;
    }
    const double stride = std::min(std::max(std::sqrt(change) / std::max(std::sqrt(curvature), 1e-300), 1.0), LONGEST_STRIDE);
    bool finite = stride > 1;
    for (auto& [a, size] : parts) for (int64_t i = 0; i < size; i++) {
      const double r = a[size + i] - a[i], v = (a[2 * size + i] - a[size + i]) - r;
      finite = finite && std::isfinite(a[EXTRAPOLATED * size + i] = a[i] + 2 * stride * r + stride * stride * v);
    }
    if (!finite) return false;
    double* logits = tables.logits.get() + EXTRAPOLATED * K;
    const double normalizer = log_sum_exp(logits, K);
    for (int64_t k = 0; k < K; k++)
      logits[k] = call.fixed_weights ? logits[(SECOND - EXTRAPOLATED) * K + k] : std::max(logits[k] - normalizer, std::log(1e-300));
    copy(tables.counts.get(), SECOND, tables.counts.get(), EXTRAPOLATED, L), tables.drift[EXTRAPOLATED] = tables.drift[SECOND];
    return true;
  }

  // Whether no extrapolated covariance can be smaller than the smallest variance.
  bool is_bounded() const {
    const int64_t L = tables.L, E = tables.E, P = tables.P;
    for (int64_t l = 0; l < L; l++) {
      const double *logs = &tables.logs[(EXTRAPOLATED * L + l) * E], *upper = &tables.upper[(EXTRAPOLATED * L + l) * P];
      double size = 0;
      for (int64_t e = 0; e < E; e++) {
        const double square = std::exp(2 * logs[e]);
        size = steps.full ? size + square : std::max(size, square);
      }
      for (int64_t i = 0; i < P; i++) size += upper[i] * upper[i];
      if (!(size <= call.ceiling)) return false;
    }
    return true;
  }
};

}  // namespace steps
