// Factors of covariances in float64. Inner loops run along rows, so that the compiler uses vectors.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.hpp"

namespace KERNELS {

// Subtracts multiples of ``count`` rows, which follow each other at a distance of D, from the entries of a row from ``first`` to ``last``;
// those of four rows at once, so that the row is read and written less often.
INLINE void subtract(double* __restrict row, const double* __restrict rows, const double* __restrict factors, int64_t count, int64_t D, int64_t first, int64_t last) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) {
    const double *a = rows + r * D, *b = a + D, *c = b + D, *d = c + D;
    const double e = factors[r], f = factors[r + 1], g = factors[r + 2], h = factors[r + 3];
    for (int64_t j = first; j < last; j++) row[j] = row[j] - e * a[j] - f * b[j] - g * c[j] - h * d[j];
  }
  for (; r < count; r++) for (int64_t j = first; j < last; j++) row[j] -= factors[r] * rows[r * D + j];
}

// How much a component magnifies relative rounding errors: the largest over the whitened coordinates y_r of the norm over j of
// U_jr s_j, where s_j is the standard deviation of coordinate j. NaN or infinite where U is singular. ``space`` holds D D + D
// numbers.
static double magnification(const double* U, int64_t D, double* space) {
  constexpr int64_t step = LANES<double>;
  // Covariance = (U U')^-1 = U^-T U^-1, so that standard deviations are the norms of the columns of U^-1. U is upper triangular,
  // and each row of its inverse is a sum of the rows below.
  double *inverse = space, *sums = inverse + D * D;
  std::memset(space, 0, (D * D + D) * sizeof(double));
  for (int64_t i = D - 1; i >= 0; i--) {
    double* row = inverse + i * D;
    // Loops begin at multiples of the number of lanes, since entries below the diagonal are zero.
    subtract(row, inverse + (i + 1) * D, U + i * D + i + 1, D - i - 1, D, (i + 1) / step * step, D);
    for (int64_t j = i + 1; j < D; j++) row[j] /= U[i * D + i];
    row[i] = 1 / U[i * D + i];
    for (int64_t j = i; j < D; j++) sums[j] += row[j] * row[j];
  }
  double* deviation = inverse;
  for (int64_t j = 0; j < D; j++) deviation[j] = std::sqrt(sums[j]), sums[j] = 0;
  for (int64_t j = 0; j < D; j++) for (int64_t r = j; r < D; r++) {
    const double value = U[j * D + r] * deviation[j];
    sums[r] += value * value;
  }
  double most = 0;
  for (int64_t r = 0; r < D; r++) if (!(sums[r] <= most)) most = sums[r];
  return std::sqrt(most);
}

// The inverse transpose U^-T of the upper Cholesky factor U of a matrix (D, D) whose upper triangle is given, and is replaced by
// the factor; false if a pivot is at most ``noise`` times its diagonal entry. Entries below the diagonal of the matrix are overwritten,
// and those above the diagonal of the result are zero. ``factors`` holds D numbers.
static bool invert(double* matrix, double* inverse, int64_t D, double noise, double* factors) {
  // Loops begin and end at multiples of the number of lanes, since other entries are not used or zero.
  constexpr int64_t step = LANES<double>;
  for (int64_t i = 0; i < D; i++) {
    double *row = matrix + i * D, *out = inverse + i * D;
    const double variance = row[i];
    const int64_t first = i / step * step, last = (i + step - 1) / step * step;
    for (int64_t j = first; j < i; j++) row[j] = 0;
    for (int64_t r = 0; r < i; r++) factors[r] = matrix[r * D + i];
    subtract(row, matrix, factors, i, D, first, D);
    if (!(row[i] > noise * variance)) return false;
    row[i] = std::sqrt(row[i]);
    const double scale = 1 / row[i];
    for (int64_t j = i + 1; j < D; j++) row[j] *= scale;
    for (int64_t j = 0; j < D; j++) out[j] = 0;
    for (int64_t r = 0; r < i; r++) factors[r] *= scale;
    subtract(out, inverse, factors, i, D, 0, last < D ? last : D);
    out[i] = scale;
  }
  return true;
}

// Points (M, D) times an upper triangular matrix (D, D). ``space`` holds 16 D numbers.
static void multiply(const double* x, const double* matrix, double* result, int64_t M, int64_t D, double* space) {
  using V = Vector<double>;
  constexpr int64_t HEIGHT = 4, PARTS = 2, WIDTH = PARTS * LANES<double>;
  for (int64_t first = 0; first < D; first += WIDTH) {
    // The columns of a block, of which those after the last one are zero; entries below the diagonal are zero.
    const int64_t last = first + WIDTH < D ? first + WIDTH : D, width = last - first;
    std::memset(space, 0, last * WIDTH * sizeof(double));
    for (int64_t i = 0; i < last; i++) std::memcpy(space + i * WIDTH, matrix + i * D + first, width * sizeof(double));
    for (int64_t m = 0; m < M; m += HEIGHT) {
      // Rows after the last one are copies of it.
      const double* rows[HEIGHT];
      V sums[HEIGHT][PARTS] = {};
      UNROLL for (int64_t r = 0; r < HEIGHT; r++) rows[r] = x + (m + r < M ? m + r : M - 1) * D;
      for (int64_t i = 0; i < last; i++) {
        V entries[PARTS];
        std::memcpy(entries, space + i * WIDTH, sizeof(entries));
        UNROLL for (int64_t r = 0; r < HEIGHT; r++) {
          const V value = broadcast(rows[r][i]);
          UNROLL for (int64_t p = 0; p < PARTS; p++) sums[r][p] = fma(value, entries[p], sums[r][p]);
        }
      }
      for (int64_t r = 0; r < HEIGHT && m + r < M; r++) std::memcpy(result + (m + r) * D + first, sums[r], width * sizeof(double));
    }
  }
}

// The sums over the points (M, stride) of weight times z z', of which (D, D) are kept. The stride is a multiple of 16, and columns
// after the D-th are zero. Weights may be null for ones.
static void scatter(const double* z, const double* weights, double* sums, int64_t M, int64_t D, int64_t stride) {
  using V = Vector<double>;
  constexpr int64_t HEIGHT = 4, PARTS = 2, WIDTH = PARTS * LANES<double>;
  for (int64_t i = 0; i < D; i += HEIGHT) for (int64_t j = i / WIDTH * WIDTH; j < D; j += WIDTH) {
    V block[HEIGHT][PARTS] = {};
    for (int64_t m = 0; m < M; m++) {
      const double *row = z + m * stride, weight = weights ? weights[m] : 1;
      V entries[PARTS];
      std::memcpy(entries, row + j, sizeof(entries));
      UNROLL for (int64_t r = 0; r < HEIGHT; r++) {
        const V value = broadcast(weight * row[i + r]);
        UNROLL for (int64_t p = 0; p < PARTS; p++) block[r][p] = fma(value, entries[p], block[r][p]);
      }
    }
    for (int64_t r = 0; r < HEIGHT && i + r < D; r++) std::memcpy(sums + (i + r) * D + j, block[r], (j + WIDTH < D ? WIDTH : D - j) * sizeof(double));
  }
  for (int64_t i = 0; i < D; i++) for (int64_t j = 0; j < i; j++) sums[i * D + j] = sums[j * D + i];
}

}  // namespace KERNELS
