// Parameters of spherical and diagonal components as digits that the tensor cores of a GPU multiply, and the moments from the sums
// that its kernels return; for CPUs.
//
// The equations are those of triton/digits.py, whose results these equal up to rounding. With the reference point a and factors
// f = 1 / h, which are powers of two, let m = f (mu - a) and
//
//   spherical:  e = c - w (|z|^2 + |m|^2 - 2 z'm),                            w = log2(e) / 2 (u / f)^2
//   diagonal:   e = c - w (sum_d v m^2 - 2 v m z + 2048 v (z^2 / 2048)),      v = log2(e) / 2 (u / f)^2 / w, w a power of two
//
// for the entries z of a point. The coefficients of z and z^2 / 2048 are split into three digits. The sum over d of the terms
// without z, less about the expected value of all terms, is rounded to the integer J.
//
// Sums over features are computed in eight parts, so that they do not depend on the number of threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#include "halves.hpp"
#include "interface.hpp"
#include "records.hpp"
#include "share.hpp"
#include "sums.hpp"

namespace digits {

// Factor of squares of entries; expected value of a squared scaled residual; largest integer with eleven bits, and largest sum of
// products of integers that is exact; smallest positive normal float32 number.
constexpr double HALVED = 0x1p-11, HALF_LOG2E = 0.5 / records::LN2, WHOLE = 2047, EXACT = 0x1p24, TINY = 0x1p-126;

// The largest power of two that is not larger than a number, and the smallest one that is not smaller; zero, infinity and NaN are
// returned unchanged.
static double power_below(double value) {
  int exponent;
  return value > 0 && std::isfinite(value) ? (std::frexp(value, &exponent), std::ldexp(1.0, exponent - 1)) : value;
}

static double power_above(double value) {
  const double below = power_below(value);
  return below == value ? value : 2 * below;
}

static void lower(double& least, double value) { least = value < least ? value : least; }
static void raise(double& most, double value) { most = value > most ? value : most; }

// Extreme values of numbers of each feature over ranges of components, and that of one number.
struct Extremes {
  std::vector<double> low, high, other;
  double largest = 0;
  explicit Extremes(int64_t D) : low(D, INFINITY), high(D, -INFINITY), other(D, -INFINITY) {}

  void add(const Extremes& part) {
    for (size_t d = 0; d < low.size(); d++) lower(low[d], part.low[d]), raise(high[d], part.high[d]), raise(other[d], part.other[d]);
    raise(largest, part.largest);
  }
};

// Calls work(k, extremes) for all components; false if it returns false for one of them.
template <class Work> static bool over_components(const DigitCall& call, double multiplications, Extremes& total, Work work) {
  std::mutex lock;
  return complete(share_ranges(call.threads, call.components, multiplications, [&](int64_t first, int64_t last) {
    Extremes part(call.dimensions);
    for (int64_t k = first; k < last; k++) if (!work(k, part)) return INTERRUPTED;
    // Minima and maxima do not depend on the order of the ranges.
    std::lock_guard<std::mutex> held(lock);
    total.add(part);
    return DONE;
  }));
}

// Sets the reference point and writes means relative to it; false if a number is not finite.
static bool center(DigitCall& call, double* reference) {
  const int64_t D = call.dimensions;
  Extremes means(D);
  if (!over_components(call, D, means, [&](int64_t k, Extremes& part) {
        const double *mean = call.means + k * D, *center = call.center;
        double *own = call.mean + k * D, *low = part.low.data(), *high = part.high.data();
        for (int64_t d = 0; d < D; d++) {
          const double value = mean[d] + center[d];
          own[d] = value, lower(low[d], value), raise(high[d], value);
        }
        return std::isfinite(sum_of(D, [&](int64_t d) { return std::abs(own[d]); }));
      })) return false;
  for (int64_t d = 0; d < D; d++) {
    const double low = means.low[d], high = means.high[d], unit = std::max(power_below(high - low), TINY);
    reference[d] = double(float(std::nearbyint(0.5 * (low + high) / unit) * unit));
    if (!std::isfinite(reference[d])) return false;
  }
  return true;
}

// Sets the factors of entries; writes their inverse numbers, which are powers of two, too, and the units w; false if the kernels would
// not be accurate enough.
static bool choose_grid(DigitCall& call, const double* reference, double* inverse, double* unit) {
  const int64_t D = call.dimensions, K = call.components;
  const bool spherical = call.spherical;
  const double norm = std::sqrt(double(D) + 2 * (call.depth + std::log(double(K))));
  double *factor = call.scale, spread = 0;
  Extremes sizes(D), units(D);
  if (!over_components(call, spherical ? 3 * D : 8 * D, sizes, [&](int64_t k, Extremes& part) {
        const double* U = call.factor + k * call.factor_stride;
        double* mean = call.mean + k * D;
        for (int64_t d = 0; d < D; d++) mean[d] -= reference[d];
        if (spherical) {
          // The sum of squares is needed again.
          call.square[k] = sum_of(D, [&](int64_t d) { return mean[d] * mean[d]; });
          const double inner = std::sqrt(call.square[k]), outer = inner + norm / std::abs(U[0]), squares = inner * inner + outer * outer;
          raise(part.largest, squares);
          return std::isfinite(squares);
        }
        double *low = part.low.data(), *high = part.high.data(), *other = part.other.data();
        for (int64_t d = 0; d < D; d++) {
          const double u = std::abs(U[d]), mu = std::abs(mean[d]), most = mu + norm / u;
          lower(low[d], u), raise(high[d], most), raise(other[d], mu);
        }
        // Factors of zero make a number infinite here; others that are not finite make a unit so.
        return true;
      })) return false;
  double binary = 0;
  for (int64_t d = 0; d < D; d++) {
    factor[d] = power_below(spherical ? std::sqrt(EXACT / sizes.largest) : WHOLE / sizes.high[d]);
    inverse[d] = 1 / factor[d];
    raise(binary, std::abs(std::log2(factor[d])));
    if (!spherical) raise(spread, sizes.other[d] * sizes.low[d] * (sizes.other[d] * sizes.low[d]));
  }
  if (!(binary <= call.most_binary) || !(spread <= call.most_spread)) return false;
  if (!over_components(call, spherical ? 4 : 6 * D, units, [&](int64_t k, Extremes& part) {
        const double *U = call.factor + k * call.factor_stride, *mean = call.mean + k * D;
        if (spherical) {
          const double ratio = U[0] * inverse[0];
          unit[k] = ratio * ratio * HALF_LOG2E;
        } else {
          // Sums of absolute values of products over the features, for points in range, and integers of the component. The latter
          // may have more than eleven bits, of which the second digit then has the last ones.
          const double inner = std::sqrt(sum_of(D, [&](int64_t d) { return U[d] * mean[d] * (U[d] * mean[d]); })), outer = 2 * inner + norm;
          const double largest = largest_of(D, [&](int64_t d) {
            const double ratio = U[d] * inverse[d];
            return HALF_LOG2E * (ratio * ratio) * std::max(2 * std::abs(mean[d]) * factor[d], 1 / HALVED);
          });
          unit[k] = power_above(std::max(HALF_LOG2E * (outer * outer) / EXACT, largest / (8 * WHOLE)));
        }
        raise(part.largest, unit[k]);
        return std::isfinite(unit[k]);
      })) return false;
  return 0 < units.largest && units.largest <= call.most_unit;
}

// Writes the numbers, digits and centers of a component; ``space`` has room for 2 W + D numbers, of which the first 2 W are zero or
// those of another component.
static void write_component(const DigitCall& call, const Kernel& kernel, const double* inverse, int64_t k, double w, double* space) {
  const int64_t D = call.dimensions, P = call.padded, W = call.spherical ? P : 2 * P, rows = call.rows;
  const double *U = call.factor + k * call.factor_stride, *mean = call.mean + k * D, *factor = call.scale;
  double own, *entry = space, *middle = entry + W, *v = middle + W;
  if (call.spherical) {
    own = call.square[k] * (factor[0] * factor[0]);
    for (int64_t d = 0; d < D; d++) entry[d] = -2 * (mean[d] * factor[d]);
  } else {
    const double inverse_w = 1 / w;
    for (int64_t d = 0; d < D; d++) {
      const double ratio = U[d] * inverse[d], m = mean[d] * factor[d];
      v[d] = HALF_LOG2E * (ratio * ratio) * inverse_w;
      entry[d] = -2 * v[d] * m, entry[P + d] = v[d] * (1 / HALVED);
      middle[d] = m, middle[P + d] = m * m * HALVED;
    }
    own = sum_of(D, [&](int64_t d) { return v[d] * (middle[d] * middle[d]); });
    kernel.split(middle, W, call.centers + k * W, nullptr, nullptr);
  }
  uint16_t* digit = call.digits + k * W;
  kernel.split(entry, W, digit, digit + rows * W, digit + 2 * rows * W);
  // The expected value is taken out of the sum, so that it has small rounding errors.
  const double J = std::nearbyint(own - std::min(double(D) * HALF_LOG2E / w, EXACT));
  call.square[k] = own - J;
  call.numbers[k] = float((call.offsets[k] - call.base) / records::LN2 - w * call.square[k]);
  call.numbers[rows + k] = float(w), call.numbers[2 * rows + k] = float(J);
}

// Writes the parameters of all components; false if the kernels would not be accurate enough.
static bool pack(DigitCall& call, const Kernel& kernel) {
  const int64_t K = call.components, D = call.dimensions, P = call.padded, W = call.spherical ? P : 2 * P, rows = call.rows;
  double usual = -INFINITY;
  for (int64_t k = 0; k < K; k++) usual = std::max(usual, call.offsets[k] - D * records::SQUARE * records::LN2);
  call.usual = usual, call.base = std::abs(usual) <= records::SMALL ? 0 : usual;
  std::vector<double> reference(D), inverse(D), unit(K);
  if (!center(call, reference.data()) || !choose_grid(call, reference.data(), inverse.data(), unit.data())) return false;
  std::fill_n(call.grid, 2 * P, 0.0f);
  for (int64_t d = 0; d < D; d++) call.grid[d] = float(reference[d]), call.grid[P + d] = float(call.scale[d]);
  complete(share_ranges(call.threads, K, 12.0 * W, [&](int64_t first, int64_t last) {
    std::vector<double> space(2 * W + D, 0.0);
    for (int64_t k = first; k < last; k++) write_component(call, kernel, inverse.data(), k, unit[k], space.data());
    return DONE;
  }));
  for (int i = 0; i < 3; i++) {
    std::memset(call.digits + (i * rows + K) * W, 0, (rows - K) * W * sizeof(uint16_t));
    std::fill_n(call.numbers + i * rows + K, rows - K, i ? 0.0f : float(records::NOTHING));
  }
  if (!call.spherical) std::memset(call.centers + K * W, 0, (rows - K) * W * sizeof(uint16_t));
  return true;
}

// Converts the sums (K, W + 4) of r X, r and r q to moments about the means, where X are the entries z of the points, or for diagonal
// components (z - a, z^2 / 2048 - b) with the centers a and b.
static void unpack(const DigitCall& call) {
  const int64_t K = call.components, D = call.dimensions, P = call.padded, W = call.spherical ? P : 2 * P;
  const double *factor = call.scale, unit = call.unit;
  std::vector<double> reciprocal(D);
  for (int64_t d = 0; d < D; d++) reciprocal[d] = 1 / factor[d];
  const double* inverse = reciprocal.data();
  complete(share_ranges(call.threads, K, 8.0 * D, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; k++) {
      const double *sums = call.sums + k * (W + 4), *mean = call.mean + k * D, s0 = sums[W] * unit;
      double* __restrict S1 = call.S1 + k * D;
      call.S0[k] = s0;
      if (call.spherical) {
        for (int64_t d = 0; d < D; d++) S1[d] = sums[d] * unit * inverse[d] - s0 * mean[d];
        call.S2[k] = (sums[W + 1] * unit + s0 * call.square[k]) * (inverse[0] * inverse[0]);
        continue;
      }
      double* __restrict S2 = call.S2 + k * D;
      for (int64_t d = 0; d < D; d++) {
        // The centers are integers of at most eleven bits.
        const double m = mean[d] * factor[d], a = nearest(m), b = nearest(m * m * HALVED);
        const double s1 = sums[d] * unit + s0 * (a - m);
        // z^2 - m^2 = (z - m)^2 + 2 m (z - m).
        S2[d] = (sums[P + d] * unit / HALVED + s0 * (b / HALVED - m * m) - 2 * m * s1) * (inverse[d] * inverse[d]);
        S1[d] = s1 * inverse[d];
      }
    }
    return DONE;
  }));
}

}  // namespace digits
