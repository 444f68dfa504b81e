// Parameters before and after consecutive EM steps.
#pragma once
#include <algorithm>
#include <memory>

#include "interface.hpp"

namespace steps {

// Copies a row of a table of rows of ``size`` numbers.
inline void copy(const double* from, int64_t row, double* to, int64_t at, int64_t size) { std::copy_n(from + row * size, size, to + at * size); }

// A call of plain EM steps whose tables belong to this object.
struct Tables {
  // Numbers that are not set at first, so that memory for steps that are not needed is not used.
  using Table = std::unique_ptr<double[]>;

  const StepCall& given;
  StepCall call;
  const int64_t K, D, L, E, P, most;  // L: number of covariances; 1 if they are common
  const Table logits, means, logs, upper, counts, total, cost, prior, drift;

  Tables(const StepCall& given, int64_t K, int64_t steps)
      : given(given), call(given), K(K), D(given.sweep.dimensions), L(given.tied ? 1 : K), E(given.sweep.family == SPHERICAL ? 1 : D),
        P(given.sweep.family == FULL ? D * (D - 1) / 2 : 0), most(steps), logits(table(steps + 1, K)), means(table(steps + 1, K * D)),
        logs(table(steps + 1, L * E)), upper(table(steps + 1, L * P)), counts(table(steps + 1, L)), total(table(steps, 1)),
        cost(table(steps, 1)), prior(table(steps, 1)), drift(table(steps + 1, 1)) {
    call.sweep.components = K, call.steps = steps;
    call.logits = logits.get(), call.means = means.get(), call.log_diagonal = logs.get(), call.upper = upper.get();
    call.counts = counts.get(), call.total = total.get(), call.cost = cost.get(), call.prior = prior.get(), call.drift = drift.get();
  }

  static Table table(int64_t rows, int64_t size) { return Table(new double[rows * size]); }

  // Sets the first mixture to row ``at`` of the tables of another call.
  void load(const StepCall& from, int64_t at) {
    copy(from.logits, at, logits.get(), 0, K), copy(from.means, at, means.get(), 0, K * D);
    copy(from.log_diagonal, at, logs.get(), 0, L * E), copy(from.upper, at, upper.get(), 0, L * P);
  }

  // Sets row ``at`` of the tables of another call to the mixture before step t.
  void store(int64_t t, const StepCall& to, int64_t at) const {
    copy(logits.get(), t, to.logits, at, K), copy(means.get(), t, to.means, at, K * D);
    copy(logs.get(), t, to.log_diagonal, at, L * E), copy(upper.get(), t, to.upper, at, L * P);
  }
};

}  // namespace steps
