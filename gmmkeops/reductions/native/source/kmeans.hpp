// Runs of k-means: greedy k-means++ and Lloyd iterations, as kmeans.py in fitting.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "interface.hpp"
#include "rounds.hpp"
#include "seeds.hpp"

namespace kmeans {

// Different points (M, D), sorted, and their total weights; as distinct in kmeans.py.
struct Points {
  int64_t M = 0;
  std::vector<double> x, mass;

  explicit Points(const StepCall& call) {
    const int64_t N = call.sweep.rows, D = call.sweep.dimensions;
    std::vector<double> rows(N * D);
    if (call.sweep.double_points) std::copy_n((const double*)call.sweep.points, N * D, rows.data());
    else std::copy_n((const float*)call.sweep.points, N * D, rows.data());
    const double* weights = call.sweep.weights;
    std::vector<int64_t> order;
    order.reserve(N), x.reserve(N * D), mass.reserve(N);
    for (int64_t n = 0; n < N; n++) if (!weights || weights[n] > 0) order.push_back(n);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return std::lexicographical_compare(&rows[a * D], &rows[a * D] + D, &rows[b * D], &rows[b * D] + D);
    });
    for (int64_t n : order) {
      const double *row = &rows[n * D], weight = weights ? weights[n] : 1;
      if (M && std::equal(row, row + D, &x[(M - 1) * D])) mass.back() += weight;
      else x.insert(x.end(), row, row + D), mass.push_back(weight), M++;
    }
  }
};

// The points times an upper triangular matrix, which may be the identity.
inline std::vector<double> multiply(const std::vector<double>& x, int64_t M, int64_t D, const double* root, const Kernel& kernel) {
  bool identity = true;
  for (int64_t i = 0; i < D; i++) for (int64_t j = i; j < D; j++) identity &= root[i * D + j] == (i == j);
  if (identity) return x;
  std::vector<double> found(M * D), space(16 * D);
  kernel.multiply(x.data(), root, found.data(), M, D, space.data());
  return found;
}

// Multiplies centers by the inverse of such a matrix.
inline void divide(double* x, int64_t M, int64_t D, const double* root) {
  for (int64_t m = 0; m < M; m++) for (int64_t j = 0; j < D; j++) {
    double left = x[m * D + j];
    for (int64_t i = 0; i < j; i++) left -= x[m * D + i] * root[i * D + j];
    x[m * D + j] = left / root[j * D + j];
  }
}

// Subtracts the weighted mean of the points, and returns it.
inline std::vector<double> center(std::vector<double>& x, const std::vector<double>& mass, int64_t D) {
  std::vector<double> mean(D);
  double all = 0;
  for (size_t m = 0; m < mass.size(); m++) {
    all += mass[m];
    for (int64_t d = 0; d < D; d++) mean[d] += mass[m] * x[m * D + d];
  }
  for (double& value : mean) value /= all;
  for (size_t m = 0; m < mass.size(); m++) for (int64_t d = 0; d < D; d++) x[m * D + d] -= mean[d];
  return mean;
}

// The nearest center of each point.
inline void label(const std::vector<double>& x, const double* centers, int64_t M, int64_t K, int64_t D, int64_t* labels) {
  for (int64_t m = 0; m < M; m++) {
    double least = std::numeric_limits<double>::infinity();
    labels[m] = 0;
    for (int64_t k = 0; k < K; k++) {
      const double reach = seeds::distance(&x[m * D], centers + k * D, D);
      if (reach < least) least = reach, labels[m] = k;
    }
  }
}

template <class Evaluate> Status run(KMeansCall& call, const Kernel& kernel, Evaluate evaluate) {
  const StepCall& given = call.steps;
  const int64_t K = given.sweep.components, D = given.sweep.dimensions, numbers = 1 + (K - 1) * call.candidates;
  const Points points(given);
  rounds::Climb one(given, K, given.steps, given.tolerance);
  one.call.sweep.rows = points.M, one.call.sweep.weights = points.mass.data();
  std::fill_n(one.logits.get(), K, 0.0), one.logs[0] = 0;
  std::vector<int64_t> chosen(K);
  std::vector<float> single;
  call.done = 0, call.points = points.M;
  for (int64_t c = 0; c < call.metrics; c++) {
    const double* root = call.roots + c * D * D;
    std::vector<double> x = multiply(points.x, points.M, D, root, kernel);
    const std::vector<double> mean = center(x, points.mass, D);
    if (!given.sweep.double_points) single.assign(x.begin(), x.end());
    one.call.sweep.points = given.sweep.double_points ? (const void*)x.data() : single.data();
    for (int64_t r = c * call.runs; r < (c + 1) * call.runs; r++) {
      seeds::choose({points.M, D, K, call.candidates, x.data(), points.mass.data(), call.uniform + r * numbers, chosen.data()});
      for (int64_t k = 0; k < K; k++) std::copy_n(&x[chosen[k] * D], D, &one.means[k * D]);
      Status status = DONE;
      if (!one.run(kernel, evaluate, status)) return status;
      double* found = &one.means[one.call.done * K * D];
      if (call.labels) label(x, found, points.M, K, D, call.labels + r * given.sweep.rows);
      for (int64_t k = 0; k < K; k++) for (int64_t d = 0; d < D; d++) found[k * D + d] += mean[d];
      divide(found, K, D, root);
      std::copy_n(found, K * D, call.centers + r * K * D);
      call.done++;
    }
  }
  return DONE;
}

}  // namespace kmeans
