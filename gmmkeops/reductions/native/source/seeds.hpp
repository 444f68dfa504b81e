// Initial centers of k-means, as seeds in fitting/kmeans.py.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "interface.hpp"

namespace seeds {

// The first index at which the sum of the numbers before it and itself is at least a fraction of their total.
inline int64_t draw(const std::vector<double>& sums, double fraction) {
  const auto place = std::lower_bound(sums.begin(), sums.end(), fraction * sums.back());
  return std::min<int64_t>(place - sums.begin(), int64_t(sums.size()) - 1);
}

// The squared distance of two points. Four sums are independent of each other, so that they are computed at the same time.
inline double distance(const double* a, const double* b, int64_t D) {
  double sums[4] = {0, 0, 0, 0};
  int64_t d = 0;
  for (; d + 4 <= D; d += 4) for (int64_t i = 0; i < 4; i++) {
    const double z = a[d + i] - b[d + i];
    sums[i] += z * z;
  }
  for (; d < D; d++) sums[0] += (a[d] - b[d]) * (a[d] - b[d]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Chooses points with probabilities proportional to their mass times their squared distance from the nearest center, each as the
// best of several candidates.
inline void choose(const SeedCall& call) {
  const int64_t M = call.points, D = call.dimensions;
  std::vector<double> sums(M), nearest(M, std::numeric_limits<double>::infinity()), reach(M), best(M);
  const double* uniform = call.uniform;
  for (int64_t k = 0; k < call.centers; k++) {
    double all = 0;
    for (int64_t m = 0; m < M; m++) sums[m] = all += k ? call.mass[m] * nearest[m] : call.mass[m];
    // Without distances, all points are centers.
    if (!(all > 0)) for (int64_t m = 0; m < M; m++) sums[m] = all += call.mass[m];
    double least = std::numeric_limits<double>::infinity();
    for (int64_t c = 0; c < (k ? call.candidates : 1); c++) {
      const int64_t chosen = draw(sums, *uniform++);
      const double* center = call.x + chosen * D;
      double inertia = 0;
      for (int64_t m = 0; m < M; m++) {
        reach[m] = std::min(nearest[m], distance(call.x + m * D, center, D));
        inertia += call.mass[m] * reach[m];
      }
      if (!c || inertia < least) least = inertia, call.chosen[k] = chosen, best.swap(reach);
    }
    nearest.swap(best);
  }
}

}  // namespace seeds
