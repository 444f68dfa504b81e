// Parameters of the components in the form that the kernels of a GPU read, the moments that these return, and bounds on the
// parameters; for CPUs.
//
// The equations are those of triton/packing.py and triton/residuals.py, whose results these equal up to rounding.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "interface.hpp"
#include "share.hpp"

namespace records {

constexpr double LN2 = 0.6931471805599453, LOG_TWO_PI = 1.8378770664093453;

// The center of the means is zero if all columns are at most this multiple of their range away from zero, see problem.py.
constexpr double CENTRAL = 3.9;

// Expected square of a scaled whitened residual; usual exponent up to which exponents are relative to zero, nats; offset of
// components of no weight.
constexpr double SQUARE = 0.71875, SMALL = 128, NOTHING = -3e38;

// Extreme numbers of an array; both are NaN if one is.
static void extremes(const double* values, int64_t count, double& least, double& most) {
  double low = INFINITY, high = -INFINITY;
  bool is_nan = false;
  for (int64_t i = 0; i < count; i++) {
    const double value = values[i];
    low = value < low ? value : low, high = value > high ? value : high, is_nan |= value != value;
  }
  least = is_nan ? NAN : low, most = is_nan ? NAN : high;
}

// Extreme numbers of each column of an array (rows, D); both are NaN if one of the column is.
static void column_extremes(const double* values, int64_t rows, int64_t D, std::vector<double>& low, std::vector<double>& high) {
  low.assign(D, INFINITY), high.assign(D, -INFINITY);
  std::vector<double> missing(D, 0.0);
  double *least = low.data(), *most = high.data(), *is_nan = missing.data();
  for (int64_t k = 0; k < rows; k++) {
    const double* row = values + k * D;
    for (int64_t d = 0; d < D; d++) {
      const double value = row[d];
      least[d] = value < least[d] ? value : least[d], most[d] = value > most[d] ? value : most[d];
      is_nan[d] = value != value ? 1.0 : is_nan[d];
    }
  }
  for (int64_t d = 0; d < D; d++) if (is_nan[d]) low[d] = high[d] = NAN;
}

// The numbers of Extent in problem.py.
static void measure(ExtentCall& call) {
  extremes(call.offsets, call.components, call.least, call.most);
  double low, high;
  extremes(call.factor, call.numbers, low, high);
  call.largest = std::isnan(low) ? NAN : std::max(-low, high), call.mean = 0, call.central = 1;
  std::vector<double> lows, highs;
  column_extremes(call.means, call.components, call.dimensions, lows, highs);
  for (int64_t d = 0; d < call.dimensions; d++) {
    const double size = std::max(-lows[d], highs[d]);
    call.mean = std::isfinite(size) && std::isfinite(call.mean) ? std::max(call.mean, size) : NAN;
    call.central &= size <= CENTRAL * (highs[d] - lows[d]);
  }
}

static int64_t entries(const RecordCall& call) {
  const int64_t D = call.dimensions;
  return call.family == FULL ? D * D : call.family == SPHERICAL ? 1 : D;
}

// Calls work with the number of dimensions as a constant of the compiler up to 8, so that loops are unrolled; 0 stands for others.
template <class Work> auto with_dimensions(int64_t D, Work work) {
  switch (D) {
    case 1: return work(std::integral_constant<int, 1>());
    case 2: return work(std::integral_constant<int, 2>());
    case 3: return work(std::integral_constant<int, 3>());
    case 4: return work(std::integral_constant<int, 4>());
    case 5: return work(std::integral_constant<int, 5>());
    case 6: return work(std::integral_constant<int, 6>());
    case 7: return work(std::integral_constant<int, 7>());
    case 8: return work(std::integral_constant<int, 8>());
    default: return work(std::integral_constant<int, 0>());
  }
}

// Computes offsets and factors; false if this shortcut does not apply: if a number is not finite, a component has weight zero, the
// center of the means is not zero, or the points are too coarse.
template <int N> bool prepare(ParameterCall& call) {
  const int64_t K = call.components, D = N ? N : call.dimensions, L = call.tied ? 1 : K, E = call.family == SPHERICAL ? 1 : D;
  double largest = -INFINITY, sum = 0;
  for (int64_t k = 0; k < K; k++) largest = std::max(largest, call.logits[k]);
  for (int64_t k = 0; k < K; k++) sum += std::exp(call.logits[k] - largest);
  const double constant = largest + std::log(sum) + 0.5 * D * LOG_TWO_PI;
  const int64_t P = call.family == FULL ? D * (D - 1) / 2 : 0, numbers = call.family == FULL ? D * D : E;
  double roundings = 0;
  for (int64_t i = 0; i < D; i++) roundings += call.rounding ? call.rounding[i] * call.rounding[i] : 0;
  const Status status = share_ranges(call.threads, L, E * EXPONENTIAL + numbers, [&](int64_t first, int64_t last) {
    const double* upper = call.upper + first * P;
    double* U = call.factor + first * numbers;
    for (int64_t l = first; l < last; l++) {
      const double* logs = call.log_diagonal + l * E;
      double determinant = 0, error = 0;
      if (call.family == SPHERICAL) {
        const double u = *U++ = std::exp(logs[0]);
        determinant = double(D) * logs[0], error = u * u * roundings;
        if (!std::isfinite(u * u)) return INTERRUPTED;
      } else for (int64_t i = 0; i < D; i++) {
        const double u = std::exp(logs[i]);
        determinant += logs[i];
        double norm = u * u;
        if (call.family == FULL) {
          for (int64_t j = 0; j < i; j++) *U++ = 0;
          *U++ = u;
          for (int64_t j = i + 1; j < D; j++) norm += *upper * *upper, *U++ = *upper++;
        } else *U++ = u;
        if (call.rounding) error += norm * call.rounding[i] * call.rounding[i];
        if (!std::isfinite(norm)) return INTERRUPTED;
      }
      if (!(error <= call.coarse * call.coarse)) return INTERRUPTED;
      for (int64_t k = l; k < (call.tied ? K : l + 1); k++) {
        const double offset = call.logits[k] + determinant - constant;
        call.offsets[k] = offset;
        // Components of weight zero have other offsets, see problem.py.
        if (!(std::abs(offset) < 1e30)) return INTERRUPTED;
      }
    }
    return DONE;
  });
  if (!complete(status)) return false;
  std::vector<double> low, high;
  column_extremes(call.means, K, D, low, high);
  for (int64_t d = 0; d < D; d++)
    if (!(std::max(-low[d], high[d]) <= CENTRAL * (high[d] - low[d])) || !std::isfinite(high[d] - low[d])) return false;
  return true;
}

// The largest column sum of |U'| |U^-T|, which bounds the condition number of an upper triangular matrix; infinite where it is
// singular. ``space`` holds D D + D numbers.
template <int N> double condition(const double* U, int64_t dimensions, double* space) {
  const int64_t D = N ? N : dimensions;
  double *inverse = space, *sums = inverse + D * D;
  std::fill_n(space, D * D + D, 0.0);
  for (int64_t i = D - 1; i >= 0; i--) {
    double* row = inverse + i * D;
    for (int64_t l = i + 1; l < D; l++) for (int64_t j = l; j < D; j++) row[j] += U[i * D + l] * inverse[l * D + j];
    row[i] = 1 / U[i * D + i];
    for (int64_t j = i + 1; j < D; j++) row[j] *= -row[i];
    for (int64_t j = i; j < D; j++) sums[j] += std::abs(row[j]);
  }
  double most = 0;
  for (int64_t r = 0; r < D; r++) {
    double sum = 0;
    for (int64_t j = 0; j <= r; j++) sum += std::abs(U[j * D + r]) * sums[j];
    if (!std::isfinite(sum)) return INFINITY;
    most = std::max(most, sum);
  }
  return most;
}

// Writes the records of all components in numbers of one type; false if a full factor is not upper triangular.
template <class F, int N> bool pack(RecordCall& call) {
  const int64_t K = call.components, D = N ? N : call.dimensions, E = entries(call), P = call.family == FULL ? D * (D + 1) / 2 : E;
  const int64_t width = 1 + 2 * D + P;
  const double scale = std::sqrt(0.5 / LN2);
  double usual = -INFINITY;
  for (int64_t k = 0; k < K; k++) usual = std::max(usual, call.offsets[k] - D * SQUARE * LN2);
  call.usual = usual, call.base = std::abs(usual) <= SMALL ? 0 : usual, call.condition = 1;
  F* const records = static_cast<F*>(call.record);
  std::vector<double> conditions(call.family == FULL ? (call.factor_stride ? K : 1) : 0);
  const double work = E + 4 * D + (call.family == FULL && call.factor_stride ? D * D * (D / 3 + 2) : E);
  const Status status = share_ranges(call.threads, K, work, [&](int64_t first, int64_t last) {
    std::vector<double> space(call.family == FULL ? D * D + D : 0), V(E);
    for (int64_t k = first; k < last; k++) {
      const double* U = call.factor + k * call.factor_stride;
      double *rest = call.rest + k * D, offset = (call.offsets[k] - D * SQUARE * LN2 - call.base) / LN2;
      F *record = records + k * width, *heads = record + 1, *shift = heads + D, *u = shift + D;
      for (int64_t e = 0; e < E; e++) V[e] = scale * U[e];
      for (int64_t d = 0; d < D; d++) {
        const double mean = call.means[k * D + d] + call.center[d];
        heads[d] = F(mean), rest[d] = mean - double(heads[d]);
      }
      if (call.family == FULL) {
        for (int64_t i = 1; i < D; i++) for (int64_t j = 0; j < i; j++) if (U[i * D + j] != 0) return INTERRUPTED;
        // A tied factor has one condition number.
        if (!k || call.factor_stride) conditions[k] = condition<N>(U, D, space.data());
        for (int64_t a = 0; a < D; a++) {
          double sum = 0;
          for (int64_t b = 0; b <= a; b++) sum += V[b * D + a] * rest[b], *u++ = F(V[b * D + a]);
          shift[a] = F(-sum);
        }
      } else {
        double change = 0;
        for (int64_t e = 0; e < E; e++) {
          u[e] = F(V[e]);
          const double ratio = double(u[e]) / V[e];
          if (std::isfinite(ratio)) change += ratio * ratio - 1;
        }
        // Rounding V changes all squares of a point by the same factor; its expected effect is added to the offset.
        offset += (call.family == SPHERICAL ? D : 1) * change * (0.5 / LN2);
        for (int64_t d = 0; d < D; d++) shift[d] = F(-V[E == 1 ? 0 : d] * rest[d]);
      }
      record[0] = F(offset);
    }
    return DONE;
  });
  if (!complete(status)) return false;
  for (double value : conditions) call.condition = std::max(call.condition, value);
  for (int64_t k = K; k < call.records; k++) {
    F* record = records + k * width;
    std::fill_n(record, width, F(0));
    record[0] = F(NOTHING);
  }
  return true;
}

// Converts sums of whitened residuals (full factors) or of residuals from the rounded means to moments about the means.
template <int N> void unpack(const RecordCall& call) {
  const int64_t K = call.components, D = N ? N : call.dimensions;
  const double scale = std::sqrt(0.5 / LN2);
  const double work = call.family == FULL ? D * D * (D + 4) : 4 * D;
  complete(share_ranges(call.threads, K, work, [&](int64_t first, int64_t last) {
    std::vector<double> X(call.family == FULL ? D * (D + 1) : 0), reciprocal(D);
    for (int64_t k = first; k < last; k++) {
      const double *U = call.factor + k * call.factor_stride, *sums = call.sums + k, *rest = call.rest + k * D;
      double *S1 = call.S1 + k * D, s0 = sums[0];
      call.S0[k] = s0;
      if (call.family != FULL) {
        double* S2 = call.S2 + (call.family == SPHERICAL ? k : k * D);
        if (call.family == SPHERICAL) *S2 = sums[(1 + D) * K];
        for (int64_t d = 0; d < D; d++) {
          const double s1 = sums[(1 + d) * K];
          S1[d] = s1 - s0 * rest[d];
          if (call.family == SPHERICAL) *S2 -= (s1 + S1[d]) * rest[d];
          else S2[d] = sums[(1 + D + d) * K] - (s1 + S1[d]) * rest[d];
        }
        continue;
      }
      // The solution z of V' z = y is computed row by row, for y = S1 (the last column) and for the columns of S2.
      double* S2 = call.S2 + k * D * D;
      for (int64_t i = 0; i < D; i++) reciprocal[i] = 1 / (scale * U[i * D + i]);
      for (int64_t i = 0; i < D; i++) {
        double* row = &X[i * (D + 1)];
        for (int64_t j = 0; j < D; j++) {
          const int64_t a = std::max(i, j), b = std::min(i, j);
          row[j] = sums[(1 + D + a * (a + 1) / 2 + b) * K];
        }
        row[D] = sums[(1 + i) * K];
        for (int64_t r = 0; r < i; r++) for (int64_t j = 0; j <= D; j++) row[j] -= scale * U[r * D + i] * X[r * (D + 1) + j];
        for (int64_t j = 0; j <= D; j++) row[j] *= reciprocal[i];
        S1[i] = row[D];
      }
      for (int64_t i = 0; i < D; i++) {
        double* row = S2 + i * D;
        for (int64_t j = 0; j < D; j++) row[j] = X[j * (D + 1) + i];
        for (int64_t r = 0; r < i; r++) for (int64_t j = 0; j < D; j++) row[j] -= scale * U[r * D + i] * S2[r * D + j];
        for (int64_t j = 0; j < D; j++) row[j] *= reciprocal[i];
      }
    }
    return DONE;
  }));
}

}  // namespace records
