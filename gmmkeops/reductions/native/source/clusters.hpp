// Mixtures of the clusters of k-means in several metrics, from which EM steps begin; as candidates.py in fitting.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "interface.hpp"
#include "kmeans.hpp"
#include "rounds.hpp"

namespace clusters {

// Lloyd iterations on the points of EM steps, of spherical components of common covariance.
inline StepCall lloyd(const ClimbCall& call, const double* zeros) {
  StepCall found = call.steps;
  found.sweep.request = HARD, found.sweep.family = SPHERICAL;
  found.tied = found.fixed_weights = found.fixed_covariances = found.bare = 1;
  found.fixed_means = found.accelerated = 0;
  found.mass = found.mass / found.scale, found.scale = 1;
  found.least = -1, found.floor = found.ceiling = 1, found.degrees = 0;
  found.ridge = zeros, found.rounding = found.scatter = nullptr;
  found.steps = call.iterations, found.tolerance = 0, found.relative = call.relative;
  return found;
}

// The step of hard EM from the centers of clusters to their mixture.
inline StepCall step(const ClimbCall& call, const double* zeros) {
  StepCall found = call.steps;
  found.sweep.request = HARD;
  found.fixed_weights = found.fixed_means = found.fixed_covariances = found.accelerated = 0;
  found.bare = 1;
  found.least = call.pool_weight / found.mass, found.degrees = 0;
  found.pool_below = call.pool_below, found.pool_weight = call.pool_weight;
  found.pool_floor = call.pool_floor, found.pool_limit = call.pool_limit;
  found.ridge = zeros, found.rounding = found.scatter = nullptr;
  return found;
}

// The means of a mixture, in the order of a combination of all columns, since a single one may have ties; as without_copies in rounds.py.
inline std::vector<double> sorted(const double* means, int64_t K, int64_t D) {
  std::vector<int64_t> order(K);
  std::vector<double> key(K), found(K * D);
  for (int64_t k = 0; k < K; k++) {
    order[k] = k;
    for (int64_t d = 0; d < D; d++) key[k] += means[k * D + d] * std::cos(double(d));
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key[a] < key[b]; });
  for (int64_t k = 0; k < K; k++) std::copy_n(means + order[k] * D, D, &found[k * D]);
  return found;
}

// Sets the first rows of the tables, and those after the rows of rounds, to the different mixtures of clusters, and ``starts`` to their
// number; to zero if a step was not an ordinary one.
template <class Evaluate> Status begin(ClimbCall& call, const Kernel& kernel, Evaluate evaluate) {
  const StepCall& given = call.steps;
  const int64_t K = given.sweep.components, D = given.sweep.dimensions, C = call.metrics;
  const std::vector<double> zeros(D);
  std::vector<double> centers(C * K * D);
  KMeansCall runs{lloyd(call, zeros.data()), C, 1, call.candidates, call.roots, call.uniform, centers.data(), nullptr, 0, 0};
  call.starts = 0;
  Status status = kmeans::run(runs, kernel, evaluate);
  if (status != DONE || runs.done < C) return status;
  const StepCall hard = step(call, zeros.data());
  rounds::Climb one(hard, K, 1, 0);
  std::vector<std::vector<double>> kept;
  for (int64_t c = 0; c < C; c++) {
    const double* root = call.roots + c * D * D;
    std::fill_n(one.logits.get(), K, 0.0);
    std::copy_n(&centers[c * K * D], K * D, one.means.get());
    for (int64_t k = 0; k < K; k++) {
      double *logs = &one.logs[k * one.E], *upper = &one.upper[k * one.P];
      if (given.sweep.family != FULL) std::fill_n(logs, one.E, 0.0);
      else for (int64_t i = 0; i < D; i++) {
        logs[i] = std::log(root[i * D + i]);
        for (int64_t j = i + 1; j < D; j++) *upper++ = root[i * D + j];
      }
    }
    if (!one.run(kernel, evaluate, status)) {
      call.starts = 0;
      return status;
    }
    std::vector<double> means = sorted(&one.means[K * D], K, D);
    const bool copy = std::any_of(kept.begin(), kept.end(), [&](const std::vector<double>& other) {
      double most = 0;
      // A difference that is not a number is no small one.
      for (int64_t i = 0; i < K * D; i++) if (!(std::abs(means[i] - other[i]) <= most)) most = std::abs(means[i] - other[i]);
      return most < call.copies;
    });
    if (copy) continue;
    one.Tables::store(1, given, call.starts), one.Tables::store(1, given, C + 2 + call.starts);
    kept.push_back(std::move(means)), call.starts++;
  }
  return DONE;
}

template <class Evaluate> Status run(ClimbCall& call, const Kernel& kernel, Evaluate evaluate) {
  call.rounds = call.accepted = call.work = call.ended = call.unchanged = 0;
  if (!call.metrics) return rounds::run(call, kernel, evaluate);
  const Status status = begin(call, kernel, evaluate);
  if (status != DONE || !call.starts) return status;
  if (call.starts == 1 && !call.climbs_one) {
    call.done[0] = 0;
    return DONE;
  }
  return rounds::run(call, kernel, evaluate);
}

}  // namespace clusters
