// Statistics of the columns of few points: their spread without outliers, and their covariance.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "interface.hpp"

namespace columns {

// Weighted mean and standard deviation of each column for the rows that are kept.
struct Moments {
  std::vector<double> center, deviation;
  bool accurate;

  template <class F> Moments(const SpreadCall& call, const F* x, const std::vector<char>& left_out) : center(call.dimensions), deviation(call.dimensions) {
    const int64_t N = call.rows, D = call.dimensions;
    const auto weight = [&](int64_t n) { return left_out[n] ? 0.0 : call.weights ? call.weights[n] : 1.0; };
    double mass = 0;
    for (int64_t n = 0; n < N; n++) {
      const double g = weight(n);
      mass += g;
      for (int64_t d = 0; d < D; d++) center[d] += g * double(x[n * D + d]);
    }
    mass = std::max(mass, 1e-300);
    for (double& value : center) value /= mass;
    // The mean is subtracted before squaring, so that no digits are lost far from the origin.
    for (int64_t n = 0; n < N; n++) {
      const double g = weight(n);
      for (int64_t d = 0; d < D; d++) {
        const double z = double(x[n * D + d]) - center[d];
        deviation[d] += g * (z * z);
      }
    }
    const auto [least, most] = std::minmax_element(deviation.begin(), deviation.end());
    accurate = call.least < *least && *most < call.most;
    for (double& value : deviation) value = std::sqrt(value / mass);
  }
};

// As trimmed_spread in data/spread.py.
template <class F> void spread(SpreadCall& call, const F* x) {
  const int64_t N = call.rows, D = call.dimensions;
  call.ordinary = 0;
  if (sizeof(F) == 8) {
    double largest = 0;
    for (int64_t i = 0; i < N * D; i++) largest = std::max(largest, std::abs(double(x[i])));
    if (!(largest < call.largest)) return;
  }
  std::vector<char> left_out(N);
  Moments found(call, x, left_out);
  std::vector<double> noise(D), reach(D);
  if (!found.accurate) return;
  for (int64_t round = 0; round < call.rounds; round++) {
    bool any = false;
    // The deviation of a constant column is a rounding error, which must not decide which rows are left out.
    for (int64_t d = 0; d < D; d++) noise[d] = call.noise * std::abs(found.center[d]), reach[d] = std::max(3 * found.deviation[d], noise[d]);
    for (int64_t n = 0; n < N; n++) {
      bool outside = false;
      for (int64_t d = 0; d < D; d++) outside |= std::abs(double(x[n * D + d]) - found.center[d]) > reach[d];
      left_out[n] = outside, any |= outside;
    }
    if (!any) break;
    Moments trimmed(call, x, left_out);
    if (!trimmed.accurate) return;
    bool less = false;
    for (int64_t d = 0; d < D; d++) less |= trimmed.deviation[d] < found.deviation[d] / 2 && found.deviation[d] > noise[d];
    if (!less) break;
    found = trimmed;
  }
  for (int64_t d = 0; d < D; d++)
    if (found.deviation[d] > call.noise * std::abs(found.center[d]) && found.deviation[d] < call.smallest) return;
  std::copy(found.center.begin(), found.center.end(), call.center);
  std::copy(found.deviation.begin(), found.deviation.end(), call.deviation);
  call.ordinary = 1;
}

// As white_metric in fitting/metric.py.
template <class F> void whiten(WhiteCall& call, const F* x, const Kernel& kernel) {
  const int64_t N = call.rows, D = call.dimensions, stride = (D + 15) / 16 * 16;
  std::vector<double> z(N * stride), mean(D), space(2 * D * D + D);
  double mass = 0;
  for (int64_t n = 0; n < N; n++) {
    const double g = call.weights ? call.weights[n] : 1;
    mass += g;
    for (int64_t d = 0; d < D; d++) {
      const double value = z[n * stride + d] = std::clamp(double(x[n * D + d]), -call.limit, call.limit);
      mean[d] += g * value;
    }
  }
  for (double& value : mean) value /= mass;
  for (int64_t n = 0; n < N; n++) for (int64_t d = 0; d < D; d++) z[n * stride + d] -= mean[d];
  kernel.scatter(z.data(), call.weights, call.covariance, N, D, stride);
  for (int64_t i = 0; i < D * D; i++) call.covariance[i] /= mass;
  for (int64_t d = 0; d < D; d++) call.covariance[d * D + d] += call.added;
  double *matrix = space.data(), *inverse = matrix + D * D;
  std::copy_n(call.covariance, D * D, matrix);
  call.regular = kernel.invert(matrix, inverse, D, 4 * D * std::numeric_limits<double>::epsilon(), inverse + D * D);
  if (call.regular) for (int64_t i = 0; i < D; i++) for (int64_t j = 0; j < D; j++) call.root[i * D + j] = j < i ? 0 : inverse[j * D + i];
}

}  // namespace columns
