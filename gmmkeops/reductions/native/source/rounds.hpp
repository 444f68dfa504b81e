// EM steps from several mixtures, and rounds of the search for a start: every component is split, EM steps, pairs are merged until as
// many are left as before, and EM steps; as fitting/rounds.py does with models/merging.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "interface.hpp"
#include "pairs.hpp"
#include "sequence.hpp"
#include "share.hpp"
#include "tables.hpp"

namespace rounds {

// Pairs times squared dimensions from which another thread saves time.
constexpr double PARALLEL = 50000;

// Steps of some components, whose tables belong to this object.
struct Climb : steps::Tables {
  Climb(const StepCall& given, int64_t K, int64_t steps, double tolerance) : Tables(given, K, steps) { call.tolerance = tolerance; }

  // Sets row ``at`` of the tables of the given call to the mixture before step t.
  void store(int64_t t, int64_t at) const { Tables::store(t, given, at); }

  // Sets the results in row ``at`` to those of the last step, whose mixture is the last one of known objective.
  void store_results(int64_t at) const {
    const int64_t t = call.done - 1;
    given.total[at] = total[t], given.cost[at] = cost[t], given.prior[at] = prior[t];
  }

  // The weights before step t.
  std::vector<double> weights(int64_t t) const {
    std::vector<double> found(&logits[t * K], &logits[t * K] + K);
    const double largest = *std::max_element(found.begin(), found.end());
    double sum = 0;
    for (double& w : found) sum += w = std::exp(w - largest);
    for (double& w : found) w /= sum;
    return found;
  }

  // The smallest one.
  double least(int64_t t) const {
    const std::vector<double> all = weights(t);
    return *std::min_element(all.begin(), all.end());
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
    double *matrix = space.data(), *inverse = matrix + D * D, *to = &upper[k * P];
    std::copy_n(spread, D * D, matrix);
    if (!kernel.invert(matrix, inverse, D, 4 * D * std::numeric_limits<double>::epsilon(), inverse + D * D)) return false;
    for (int64_t i = 0; i < D; i++) {
      logs[k * D + i] = std::log(inverse[i * D + i]);
      for (int64_t j = i + 1; j < D; j++) *to++ = inverse[j * D + i];
    }
    return true;
  }

  // The covariance of a component before step t, in the shape of S2.
  void get(int64_t t, int64_t k, double* spread, std::vector<double>& space) const {
    const double *diagonal = &logs[(t * K + k) * E], *from = &upper[(t * K + k) * P];
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

  // Performs the steps from ``first`` to ``last``; false if one of them was not an ordinary one.
  template <class Evaluate> bool run(const Kernel& kernel, Evaluate evaluate, Status& status, int64_t first, int64_t last) {
    bool ended = false;
    if (!first) counts[0] = NAN, drift[0] = 0;
    call.steps = last;
    status = steps::run(call, kernel, evaluate, &ended, false, first);
    return status == DONE && ended && call.done > 0;
  }

  // Performs all steps.
  template <class Evaluate> bool run(const Kernel& kernel, Evaluate evaluate, Status& status) { return run(kernel, evaluate, status, 0, most); }
};

// Both halves of component k of ``from``, the first table of ``into``; false if one is singular.
inline bool split(const ClimbCall& call, const Climb& from, Climb& into, const Kernel& kernel) {
  const int64_t K = from.K, D = from.D, size = call.steps.sweep.family == FULL ? D * D : from.E;
  const bool full = call.steps.sweep.family == FULL;
  std::vector<double> spread(size), axis(D), space(full ? 2 * D * D + D : 0);
  for (int64_t k = 0; k < K; k++) {
    from.get(0, k, spread.data(), space);
    std::fill(axis.begin(), axis.end(), 0.0);
    if (full) {
      const double length = std::sqrt(std::max(0.0, kernel.longest_axis(spread.data(), axis.data(), D, space.data())));
      int64_t entry = 0;
      for (int64_t d = 1; d < D; d++) if (std::abs(axis[d]) > std::abs(axis[entry])) entry = d;
      const double distance = call.half * (axis[entry] < 0 ? -length : length);
      for (int64_t d = 0; d < D; d++) axis[d] *= distance;
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
// ``halves`` becomes whether all pairs are the halves of one component.
inline bool merge(const ClimbCall& call, const Climb& from, int64_t t, Climb& into, const Kernel& kernel, bool* halves = nullptr) {
  const int64_t n = from.K, D = from.D;
  const bool full = call.steps.sweep.family == FULL;
  const int64_t size = full ? D * D : from.E;
  std::vector<double> weights = from.weights(t), means(&from.means[t * n * D], &from.means[t * n * D] + n * D), spreads(n * size), space(full ? 2 * D * D + D : 0);
  if (halves) *halves = true;
  for (int64_t k = 0; k < n; k++) from.get(t, k, &spreads[k * size], space);
  PairCall pair{full, call.steps.sweep.family == SPHERICAL, 1, 0, n, D, from.E, 0, call.blocks,
                weights.data(), means.data(), spreads.data(), call.points, nullptr, nullptr};
  std::vector<pairs::Component> components(n);
  pairs::Worker worker(pair, &components);
  std::vector<int64_t> alive(n);
  // Costs of pairs, or lower bounds on them, which are replaced by the costs where they are the least ones. The halves of one component
  // overlap, so that few other pairs need more than the bound: 0.20 ms instead of 0.35 ms for 8 components in 20 dimensions.
  std::vector<double> costs(n * n);
  std::vector<char> exact(n * n, 0);
  for (int64_t k = 0; k < n; k++) alive[k] = k, worker.prepare(components[k], k);
  const int threads = double(n) * n * D * D > PARALLEL ? call.steps.sweep.threads : 1;
  const Status status = share(threads, size_t(n), [&](size_t i) {
    pairs::Worker own(pair, &components);
    for (int64_t j = i + 1; j < n; j++) costs[i * n + j] = own.least(i, j);
    return DONE;
  });
  if (status != DONE) throw std::bad_alloc();
  while (int64_t(alive.size()) > into.K) {
    int64_t first = -1, second = -1;
    for (size_t a = 0; a < alive.size(); a++) for (size_t b = a + 1; b < alive.size(); b++)
      if (first < 0 || costs[alive[a] * n + alive[b]] < costs[first * n + second]) first = alive[a], second = alive[b];
    if (!exact[first * n + second]) {
      costs[first * n + second] = worker.cost(first, second), exact[first * n + second] = 1;
      continue;
    }
    if (halves && second != first + into.K) *halves = false;
    const double W = worker.merge(first, second);
    std::copy(worker.mean.begin(), worker.mean.end(), &means[first * D]);
    std::copy(worker.spread.begin(), worker.spread.end(), &spreads[first * size]);
    weights[first] = W, weights[second] = 0;
    alive.erase(std::find(alive.begin(), alive.end(), second));
    worker.prepare(components[first], first);
    for (int64_t other : alive)
      if (other != first) {
        const int64_t i = std::min(first, other), j = std::max(first, other);
        costs[i * n + j] = worker.least(i, j), exact[i * n + j] = 0;
      }
  }
  for (int64_t k = 0; k < into.K; k++) {
    const int64_t from_k = alive[k];
    into.logits[k] = std::log(std::max(weights[from_k], 1e-300));
    std::copy_n(&means[from_k * D], D, &into.means[k * D]);
    if (!into.set(k, &spreads[from_k * size], kernel, space)) return false;
  }
  return true;
}

// Whether each component still has the points of its two halves before step t, up to a small change of weight and mean. The halves
// of well separated components only exchange points with each other.
inline bool unchanged(const Climb& from, const Climb& twice, int64_t t, double change) {
  const int64_t K = from.K, D = from.D;
  const bool full = from.given.sweep.family == FULL;
  const std::vector<double> before = from.weights(0), now = twice.weights(t);
  std::vector<double> moved(D);
  for (int64_t k = 0; k < K; k++) {
    const double sum = now[k] + now[K + k];
    if (!(std::abs(sum - before[k]) <= change * before[k])) return false;
    for (int64_t d = 0; d < D; d++) {
      const double mean = (now[k] * twice.means[(t * 2 * K + k) * D + d] + now[K + k] * twice.means[(t * 2 * K + K + k) * D + d]) / sum;
      moved[d] = mean - from.means[k * D + d];
    }
    // The squared length of U' times the change of the mean.
    double length = 0;
    const double* upper = &from.upper[k * from.P];
    std::vector<double> along(D);
    for (int64_t i = 0; i < D; i++) {
      along[i] += moved[i] * std::exp(from.logs[k * from.E + (from.E == 1 ? 0 : i)]);
      if (full) for (int64_t j = i + 1; j < D; j++) along[j] += moved[i] * *upper++;
    }
    for (double value : along) length += value * value;
    if (!(length <= change * change)) return false;
  }
  return true;
}

// The index of the best mixture that was reached: the first one of those whose objectives are equal up to rounding, without those of a
// component of fewer than D + 1 points if there are others; -1 if an objective is not known. Sets ``value``; as Climber in rounds.py.
inline int64_t best_start(ClimbCall& call) {
  const StepCall& given = call.steps;
  const int64_t K = given.sweep.components;
  Climb one(given, K, 0, 0);
  std::vector<double> values(call.starts);
  std::vector<char> sound(call.starts);
  bool any = false;
  for (int64_t s = 0; s < call.starts; s++) {
    if (!call.done[s]) return -1;
    one.load(given, s);
    values[s] = call.constant + steps::objective(given, s);
    sound[s] = std::isfinite(values[s]) && one.least(0) * call.count >= given.sweep.dimensions + 1;
    any |= sound[s];
  }
  double lowest = std::numeric_limits<double>::infinity();
  const auto counts = [&](int64_t s) { return std::isfinite(values[s]) && (sound[s] || !any); };
  for (int64_t s = 0; s < call.starts; s++) if (counts(s)) lowest = std::min(lowest, values[s]);
  for (int64_t s = 0; s < call.starts; s++)
    if (counts(s) && values[s] <= lowest + call.tie * std::max(1.0, std::abs(lowest))) {
      call.value = values[s];
      return s;
    }
  return -1;
}

// Performs rounds from row ``best`` as long as they improve the objective, until a step is not an ordinary one; as Climber in rounds.py.
template <class Evaluate> Status improve(ClimbCall& call, const Kernel& kernel, Evaluate evaluate) {
  const StepCall& given = call.steps;
  const int64_t K = given.sweep.components;
  Climb from(given, K, 1, 0), twice(given, 2 * K, call.split_steps + 1, call.split_tolerance), once(given, K, call.merged_steps + 1, call.merged_tolerance);
  const int64_t early = call.early > 0 ? std::min(call.early, twice.most) : twice.most;
  from.load(given, call.best);
  Status status = DONE;
  while (!call.ended && call.rounds < call.most) {
    if (!split(call, from, twice, kernel) || !twice.run(kernel, evaluate, status, 0, early)) return status;
    if (early < twice.most && twice.call.done == early && !steps::settled(twice.call, early)) {
      bool halves = false;
      if (unchanged(from, twice, early, call.change) && merge(call, twice, early, once, kernel, &halves) && halves) {
        call.rounds++, call.work += 2 * K * early, call.ended = call.unchanged = 1;
        break;
      }
      if (!twice.run(kernel, evaluate, status, early, twice.most)) return status;
    }
    if (!merge(call, twice, twice.call.done - 1, once, kernel) || !once.run(kernel, evaluate, status)) return status;
    const int64_t t = once.call.done - 1;
    const double value = call.constant + steps::objective(once.call, t), best = std::min(value, call.value), least = once.least(t) * call.count;
    call.rounds++, call.work += 2 * K * twice.call.done + K * once.call.done;
    call.ended = 1;
    if (call.value <= best + call.tie * std::max(1.0, std::abs(best))) break;
    if (least < std::min(double(given.sweep.dimensions + 1), from.least(0) * call.count)) break;
    once.store(0, call.starts), once.store(t, call.starts + 1), once.store_results(call.starts), from.load(given, call.starts + 1);
    call.ended = call.value - value < call.gain;
    call.value = value, call.accepted++;
  }
  call.ended |= call.rounds == call.most;
  return DONE;
}

template <class Evaluate> Status run(ClimbCall& call, const Kernel& kernel, Evaluate evaluate) {
  const StepCall& given = call.steps;
  if (!std::isnan(call.known)) {
    call.best = 0, call.value = call.known;
    return improve(call, kernel, evaluate);
  }
  Climb one(given, given.sweep.components, given.steps, given.tolerance);
  for (int64_t s = 0; s < call.starts; s++) {
    Status status = DONE;
    one.load(given, s);
    const bool ordinary = one.run(kernel, evaluate, status);
    if (status != DONE) return status;
    call.done[s] = ordinary ? one.call.done : 0;
    if (ordinary) one.store(one.call.done - (call.after ? 0 : 1), s), one.store_results(s);
  }
  if (!call.most) return DONE;
  call.best = best_start(call);
  return call.best < 0 ? DONE : improve(call, kernel, evaluate);
}

}  // namespace rounds
