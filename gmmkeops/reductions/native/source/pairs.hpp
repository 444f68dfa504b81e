// Costs of merging pairs of components, as in models/merging.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "interface.hpp"

namespace pairs {

// Points at which the exponents of a component are evaluated together.
constexpr int64_t BLOCK = 24;

// One component: its mean, the lower Cholesky factor of its covariance, the logarithm of the determinant of the inverse factor, and
// points of the component relative to its mean, one row for each dimension of a block.
struct Component {
  const double* mean = nullptr;
  std::vector<double> lower, points;
  double logs = 0;
};

struct Worker {
  const PairCall& call;
  const int64_t D, E;
  const bool full;
  const std::vector<Component>* known;  // the components, if all have been prepared
  Component first, second, whole;
  std::vector<double> mean, spread, white;
  double share = 0.5;

  explicit Worker(const PairCall& call, const std::vector<Component>* known = nullptr)
      : call(call), D(call.dimensions), E(call.full ? call.dimensions * call.dimensions : call.columns), full(call.full),
        known(known), mean(D), spread(E), white(D * BLOCK) {
    whole.lower.resize(E);
  }

  void prepare(Component& component, int64_t i) const {
    component.lower.resize(E);
    factorize(component, call.means + i * D, call.spreads + i * E);
    if (!call.points) return;
    component.points.resize(call.blocks * D * BLOCK);
    for (int64_t block = 0; block < call.blocks; block++) draw(component, block * D * BLOCK);
  }

  void factorize(Component& component, const double* mean, const double* spread) const {
    component.mean = mean;
    component.logs = 0;
    double* L = component.lower.data();
    if (!full) {
      for (int64_t e = 0; e < E; e++) {
        L[e] = std::sqrt(std::max(spread[e], 1e-300));
        component.logs -= std::log(L[e]) * (double(D) / E);
      }
      return;
    }
    const double noise = 4 * D * std::numeric_limits<double>::epsilon();
    for (int64_t i = 0; i < D; i++) for (int64_t j = 0; j <= i; j++) {
      double value = spread[i * D + j];
      for (int64_t r = 0; r < j; r++) value -= L[i * D + r] * L[j * D + r];
      if (i == j) {
        L[i * D + i] = std::sqrt(std::max({value, noise * spread[i * D + i], 1e-300}));
        component.logs -= std::log(L[i * D + i]);
      } else L[i * D + j] = value / L[j * D + j];
    }
  }

  // Points of a component, relative to its mean: x = L z.
  void draw(Component& component, int64_t at) const {
    const double* z = call.points + at;
    for (int64_t d = 0; d < D; d++) {
      double* into = &component.points[at + d * BLOCK];
      std::fill(into, into + BLOCK, 0.0);
      for (int64_t r = full ? 0 : d; r <= d; r++) {
        const double l = component.lower[full ? d * D + r : E == 1 ? 0 : d];
        for (int64_t s = 0; s < BLOCK; s++) into[s] += l * z[r * BLOCK + s];
      }
    }
  }

  // Exponents at points x about the mean ``from``.
  void exponents(const Component& component, const double* x, const double* from, double* out) {
    for (int64_t s = 0; s < BLOCK; s++) out[s] = 0;
    for (int64_t d = 0; d < D; d++) {
      double* row = &white[d * BLOCK];
      const double shift = from[d] - component.mean[d];
      for (int64_t s = 0; s < BLOCK; s++) row[s] = x[d * BLOCK + s] + shift;
      if (full) for (int64_t r = 0; r < d; r++) {
        const double l = component.lower[d * D + r];
        for (int64_t s = 0; s < BLOCK; s++) row[s] -= l * white[r * BLOCK + s];
      }
      const double inverse = 1 / component.lower[full ? d * D + d : E == 1 ? 0 : d];
      for (int64_t s = 0; s < BLOCK; s++) row[s] *= inverse, out[s] += row[s] * row[s];
    }
    for (int64_t s = 0; s < BLOCK; s++) out[s] = component.logs - 0.5 * out[s];
  }

  // Weight, mean and covariance of a merged pair; the weight is returned, and ``share`` becomes the fraction of the first one.
  double merge(int64_t i, int64_t j) {
    const double a = call.weights[i], W = a + call.weights[j];
    share = W > 0 ? a / W : 0.5;
    const double *mi = call.means + i * D, *mj = call.means + j * D, *si = call.spreads + i * E, *sj = call.spreads + j * E;
    double square = 0;
    for (int64_t d = 0; d < D; d++) mean[d] = mj[d] + share * (mi[d] - mj[d]), square += (mi[d] - mj[d]) * (mi[d] - mj[d]);
    for (int64_t e = 0; e < E; e++) {
      const double between = full ? (mi[e / D] - mj[e / D]) * (mi[e % D] - mj[e % D]) : E == D && !call.trace ? (mi[e] - mj[e]) * (mi[e] - mj[e]) : square / D;
      spread[e] = share * si[e] + (1 - share) * sj[e] + share * (1 - share) * between;
    }
    return W;
  }

  // The entropy of the labels of a merged pair, nats per point of it.
  double entropy() const { return (share > 0 ? -share * std::log(share) : 0) + (share < 1 ? -(1 - share) * std::log(1 - share) : 0); }

  // The upper bound on the cost of merging a pair of prepared components, which becomes ``whole``.
  double bound(const Component& one, const Component& two, int64_t i, int64_t j) {
    const double W = merge(i, j);
    factorize(whole, mean.data(), spread.data());
    return std::max(0.0, call.weights[i] * one.logs + call.weights[j] * two.logs - W * whole.logs);
  }

  // The lower bound on this cost, which is computed faster than the cost; for components that are all known.
  double least(int64_t i, int64_t j) {
    const double upper = bound((*known)[i], (*known)[j], i, j);
    return call.points ? std::max(0.0, upper - (call.weights[i] + call.weights[j]) * entropy()) : upper;
  }

  // The cost of merging a pair of components.
  double cost(int64_t i, int64_t j) {
    const double a = call.weights[i], b = call.weights[j], W = a + b;
    if (!known) prepare(first, i), prepare(second, j);
    const Component &one = known ? (*known)[i] : first, &two = known ? (*known)[j] : second;
    const double upper = bound(one, two, i, j);
    if (!call.points) return upper;
    double found = 0, own[BLOCK], other[BLOCK], merged[BLOCK];
    for (int side = 0; side < 2; side++) {
      const Component &self = side ? two : one, &rest = side ? one : two;
      const double mass = side ? b : a, left = side ? a : b;
      if (!(mass > 0)) continue;
      const double here = std::log(mass) + self.logs, there = std::log(left);
      for (int64_t block = 0; block < call.blocks; block++) {
        const double *z = call.points + block * D * BLOCK, *x = self.points.data() + block * D * BLOCK;
        exponents(rest, x, self.mean, other);
        exponents(whole, x, self.mean, merged);
        for (int64_t s = 0; s < BLOCK; s++) own[s] = 0;
        for (int64_t d = 0; d < D; d++) for (int64_t s = 0; s < BLOCK; s++) own[s] += z[d * BLOCK + s] * z[d * BLOCK + s];
        // The logarithm of a product of numbers from 1 to 2 is the sum of their logarithms.
        double sum = 0, product = 1;
        for (int64_t s = 0; s < BLOCK; s++) {
          const double p = here - 0.5 * own[s], q = there + other[s];
          sum += std::max(p, q) - merged[s];
          product *= 1 + std::exp(-std::abs(p - q));
        }
        found += mass * ((sum + std::log(product)) / BLOCK - std::log(W)) / call.blocks;
      }
    }
    return std::max(0.0, std::min(std::max(found, upper - W * entropy()), upper));
  }
};

}  // namespace pairs
