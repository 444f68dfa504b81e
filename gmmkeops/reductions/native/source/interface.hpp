// The call that Python passes to the driver, and the parts of it that the driver passes to the kernels.
//
// All structures are plain data. library.py declares the calls with the same fields in the same order; change ABI whenever they
// change.
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int32_t ABI = 15;

enum Request : int32_t { LOG_SUM_EXP, ARGMAX, TOP_K, SOFT, HARD, STOCHASTIC, POINT_GRADIENT };
enum Family : int32_t { FULL, DIAGONAL, SPHERICAL };
enum Status : int32_t { DONE = 0, OUT_OF_MEMORY = 1, INTERRUPTED = 2 };

struct Call {
  int32_t request, family;
  int32_t double_points;      // whether points, values and gradients are float64 instead of float32
  int32_t double_arithmetic;  // whether exponents are computed in float64 for all components
  int32_t top, threads;       // number of largest exponents; largest number of threads
  int64_t rows, components, dimensions;
  const void* points;                                   // (N, D)
  const double *offsets, *means, *factor, *center;      // (K,), (K, D) relative to the center, (K, D, D) or (K, D or 1), (D,)
  int64_t factor_stride;                                // numbers from one component's factor to the next; 0 if tied
  const double* weights;                                // (N,), or null for ones
  double unit;                                          // power of two by which the weights have been divided
  uint64_t seed;
  // Row ranges and their candidate lists; no row ranges for every pair.
  int64_t ranges;
  const int64_t *range, *owner, *pointer, *index;       // (S, 2), (S,), (T + 1,), all lists
  const double* floor;                                  // (S,), smallest minimum for which a list is long enough
  double* minima;                                       // (S,)
  // Results; null where the request has none.
  void* values;                                         // (N,) log-sum-exps or largest exponents, (N, top) for the top ones
  int64_t* labels;                                      // (N,) or (N, top)
  void* gradient;                                       // (N, D)
  double *S0, *S1, *S2, *total;
  int64_t *odd, *doubles;                               // rows whose values are not finite; components evaluated in float64
  const int32_t* stop;                                  // becomes nonzero when the call is to end early
};

// EM steps over every pair of a point and a component, without priors but a constant one of the covariances. ``sweep`` describes
// the E-step; the steps set its parameters and its sums. A step that needs anything else (a component that would be pruned, a
// singular covariance, a row without a finite value, points that float32 cannot hold) is not performed, and ends the call.
struct StepCall {
  Call sweep;
  int32_t tied, fixed_weights, fixed_means, fixed_covariances;
  int32_t bare;             // whether the offsets are the logits themselves, as in k-means
  int32_t accelerated;      // whether each step is an iteration of SQUAREM, see squarem.hpp
  int64_t steps, done;      // steps that are asked for, and those that were performed
  double mass, scale;       // total weight of all points, and its ratio to the weight of the points of the sweep
  double least;             // smallest weight of a component that is not pruned
  double floor, ceiling;    // smallest variance, and largest sum of the squares of a factor
  double coarse;            // largest norm of the change of a whitened residual by the rounding of the points
  double degrees;           // pseudo-points of each covariance
  // The call ends when a step decreases the objective by less than a tolerance (nats per point; negative infinity: never) plus a
  // fraction of the objective.
  double tolerance, relative;
  // Average of each covariance with a pooled one, see Steps::pool: weight of a component below which it is computed (0: never), number
  // of points that the pooled covariance stands for, ratio of its floor and of its limit to a typical variance.
  double pool_below, pool_weight, pool_floor, pool_limit;
  const double *ridge, *rounding;  // (D,), added to variances; (D,) rounding errors of the points, or null
  const double* scatter;    // scatter of the pseudo-points, in the shape of S2, or null
  // Parameters before each step and after the last one, as factors store them: (steps + 1, K), (steps + 1, K, D),
  // (steps + 1, K or 1, D or 1), (steps + 1, K or 1, D (D - 1) / 2).
  double *logits, *means, *log_diagonal, *upper;
  double *counts;           // (steps + 1, K or 1), fractions of the points for each covariance; NaN before the first step if unknown
  double *total, *cost;     // (steps,), log-likelihoods; 1/2 sum_k c_k tr(ridge precision_k)
  double *prior;            // (steps,), sum_k degrees / 2 log |Sigma_k| + 1/2 tr(scatter precision_k), nats
  double *drift;            // (steps + 1,), sum of the changes of this cost by those of the fractions
};

// Centers and standard deviations of the columns of points without outliers, see columns.hpp.
struct SpreadCall {
  int32_t double_points, unused;
  int64_t rows, dimensions, rounds;             // N, D, largest number of rounds of trimming
  const void* points;                           // (N, D), finite
  const double* weights;                        // (N,), or null for ones
  double largest, least, most;                  // limit of the points, and limits of sums of squares, outside of which digits are lost
  double smallest, noise;                       // as _SMALLEST and NOISE in data/spread.py
  double *center, *deviation;                   // (D,)
  int64_t ordinary;                             // whether the results are accurate
};

// The covariance of points, and the matrix by which they are multiplied to be white, see columns.hpp.
struct WhiteCall {
  int32_t double_points, unused;
  int64_t rows, dimensions;
  const void* points;                           // (N, D)
  const double* weights;                        // (N,), or null for ones
  double limit, added;                          // limit to which entries are clipped; constant added to the variances
  double *covariance, *root;                    // (D, D)
  int64_t regular;                              // whether the covariance is not singular
};

// Initial centers of k-means by greedy k-means++, see seeds.hpp.
struct SeedCall {
  int64_t points, dimensions, centers, candidates;  // M, D, K, candidates for each center but the first one
  const double *x, *mass;   // (M, D), (M,)
  const double* uniform;    // (1 + (K - 1) candidates,), random numbers from 0 to 1
  int64_t* chosen;          // (K,), indices of the centers
};

// The costs of merging pairs of components.
struct PairCall {
  int32_t full, trace, threads, unused;   // whether covariances are matrices; whether one variance holds for all dimensions
  int64_t components, dimensions, columns, pairs, blocks;  // K, D, numbers of a covariance that is no matrix, pairs, blocks of points
  const double *weights, *means, *spreads;  // (K,), (K, D), (K, D, D) or (K, columns)
  const double* points;     // (blocks, D, 24) points of the standard normal distribution, or null for the upper bound
  const int64_t* pair;      // (pairs, 2)
  double* cost;             // (pairs,)
};

// Runs of k-means in several metrics, see kmeans.hpp. ``steps`` describes Lloyd iterations on the points.
struct KMeansCall {
  StepCall steps;
  int64_t metrics, runs;    // number C of metrics, and R runs in each of them
  int64_t candidates;       // as in SeedCall
  const double* roots;      // (C, D, D), upper triangular matrices by which the points are multiplied
  const double* uniform;    // (C, R, 1 + (K - 1) candidates), random numbers from 0 to 1
  double* centers;          // (C, R, K, D), in the coordinates of the given points
  int64_t* labels;          // (C, R, N), index of the nearest center of each different point in the metric, or null
  int64_t points;           // number of different points, which are sorted
  int64_t done;             // number of runs that were performed; less than all if one of them was not an ordinary one
};

// EM steps from several mixtures, and rounds of splitting and merging from the best one, see rounds.hpp. The tables of ``steps`` have a
// row for each mixture, which the call replaces by the last one whose objective is known, and, if there are rounds, two more rows. These
// then hold the mixture of the last accepted round before and after its last EM steps. ``total``, ``cost`` and ``prior`` belong to the
// mixtures that were reached, and in the first one of the additional rows to that of the last accepted round. If the mixtures are those
// of clusters, the tables have C + 2 rows as if there were C mixtures, and C further ones for the mixtures before the steps.
struct ClimbCall {
  StepCall steps;
  int64_t starts;
  int64_t* done;            // (starts,), numbers of steps; 0 if one of them was not an ordinary one
  int64_t after;            // whether the results are the mixtures after the last steps instead
  int64_t split_steps, merged_steps;            // largest numbers of steps after the split and after the merge
  double split_tolerance, merged_tolerance;     // their tolerances, nats per point
  double half;                                  // distance of the halves of a component from its mean, in standard deviations
  const double* points;                         // as in PairCall
  int64_t blocks;
  int64_t most, rounds;                         // largest number of rounds, and number of those that were performed
  int64_t best;                                 // index of the mixture from which they began; -1 if an objective is not known
  double known;                                 // objective of the first mixture, from which rounds begin without steps; or NaN
  int64_t accepted, ended;                      // number of accepted rounds; whether no further round is to be performed
  int64_t work;                                 // E-steps of the rounds times components
  double value, constant;                       // objective of the best mixture, and its part that is the same for all, nats per point
  double gain, tie;                             // smallest improvement for another round; relative difference of equal objectives
  double count;                                 // effective number of points
  int64_t early;                                // number of steps after the split after which the round may end, see unchanged in rounds.hpp
  double change;                                // largest change up to which a component is considered unchanged
  int64_t unchanged;                            // whether the last round ended since no component changed
  // The mixtures are those of the clusters of a run of k-means in each of C metrics, without copies, see clusters.hpp; none if C is zero.
  int64_t metrics, candidates, iterations;      // C; candidates for each initial center; largest number of Lloyd iterations
  int64_t climbs_one;                           // whether steps are performed from the mixture if it is the only one
  const double *roots, *uniform;                // (C, D, D) and (C, 1 + (K - 1) candidates), as in KMeansCall
  double relative;                              // decrease of the inertia, as a fraction, below which the iterations end
  double pool_below, pool_weight, pool_floor, pool_limit;  // as in StepCall, for the covariances of the clusters
  double copies;                                // largest difference of the means of copies
};

// Parameters of the components as records of a GPU engine, and its sums, see records.hpp. A component takes 1 + 2 D numbers and
// those of its factor; its sums are S0, D rows of S1, and the distinct rows of S2.
struct RecordCall {
  int32_t family, double_points;                        // whether records are float64 instead of float32
  int32_t threads, unused;                              // largest number of threads
  int64_t components, dimensions, records;              // K, D, number of records, of which those after the K-th have no weight
  const double *offsets, *means, *factor, *center;      // as in Call
  int64_t factor_stride;                                // as in Call
  void* record;                                         // (records, 1 + 2 D + numbers of a factor)
  double* rest;                                         // (K, D), means minus rounded means
  double base, usual, condition;                        // base and largest usual log-sum-exp, nats; condition number of full factors
  const double* sums;                                   // (1 + D + distinct numbers of S2, K)
  double *S0, *S1, *S2;
  int64_t triangular;                                   // whether full factors are upper triangular
};

// Parameters of spherical or diagonal components as digits of a GPU engine, and its sums, see digits.hpp. W is P for spherical
// components and 2 P for diagonal ones.
struct DigitCall {
  int32_t spherical, threads;                           // whether components are spherical; largest number of threads
  int64_t components, dimensions, rows, padded;         // K, D, KP >= K, and P >= D, a multiple of 16
  const double *offsets, *means, *factor, *center;      // as in Call
  int64_t factor_stride;                                // as in Call
  double depth;                                         // distance of log-sum-exps from their usual size of points in range, nats
  double most_unit, most_spread, most_binary;           // limits of Grid in triton/digits.py, up to which kernels are accurate
  uint16_t *digits, *centers;                           // (3, KP, W), (KP, W), float16; the latter for diagonal components only
  float *numbers, *grid;                                // (3, KP), (2, P)
  double *mean, *scale, *square;                        // (K, D) relative to the reference point, (D,) factors of entries, (K,)
  double base, usual;                                   // as in RecordCall
  const double* sums;                                   // (K, W + 4)
  double unit;                                          // factor of the sums
  double *S0, *S1, *S2;
  int64_t accurate;                                     // whether kernels are accurate; the arrays are then written
};

// Offsets and factors of a mixture, from the parameters as factors store them.
struct ParameterCall {
  int32_t family, tied, threads, unused;
  int64_t components, dimensions;
  const double *logits, *means, *log_diagonal, *upper;  // (K,), (K, D), (K or 1, D or 1), (K or 1, D (D - 1) / 2)
  const double* rounding;                               // as in StepCall
  double coarse;                                        // as in StepCall
  double *offsets, *factor;                             // (K,), (K or 1, numbers of a factor)
  int64_t valid;      // whether the call applies, see prepare in records.hpp
};

// Bounds on parameters, see records.hpp and problem.py.
struct ExtentCall {
  int64_t components, dimensions, numbers;              // K, D, numbers of all factors
  const double *offsets, *means, *factor;               // (K,), (K, D), (numbers,)
  double least, most;                                   // extreme offsets; NaN if one is
  double mean, largest;                                 // largest absolute values of means and factors; not finite if an entry is not
  int64_t central;                                      // whether the common center of the means is known to be zero
};

// Parameters of the components as the kernels read them, for one type of numbers. A component takes ``stride`` numbers:
//   full:      the rounded mean (D), the remainder U'(rounded mean - mean) (D), U scaled, and the offset
//   diagonal:  the rounded mean (D), the remainder (D), the factor (D) and the offset
//   spherical: the rounded mean (D), its difference from the mean (D), the square of the factor, and the offset
// Factors are scaled by sqrt(log2(e) / 2) and offsets by log2(e), so that exponents are in bits.
template <class F> struct Packed {
  F* numbers;
  int64_t stride;
};

// The rows of U' are stored in panels, whose heights are about equal; height of the next panel if ``left`` rows are left.
static constexpr int64_t panel_height(int64_t left) {
  const int64_t panels = (left + 5) / 6;
  return (left + panels - 1) / panels;
}

struct Parameters {
  Packed<float> single;
  Packed<double> wide;
  uint8_t* is_wide;  // (K,) whether a component is evaluated in float64 though points are float32
  bool any_wide;
  double deepest;    // smallest log-sum-exp or largest exponent (nats) of a row that is evaluated
  bool expanded;     // whether the remainders of diagonal components hold -mu u, see Diagonal::expanded
};

// Sums of one group of rows. A component has ``sums`` numbers in ``moments``, in an order that the kernel defines.
struct Group {
  int64_t first, last;  // rows, or row ranges of the schedule
  double* moments;
  double total;
  int64_t odd;  // rows whose values are not finite
};

// Aligned memory of one thread, which its tiles use one after the other.
struct Memory {
  char* bytes;
  size_t size;
};

// One level of the kd-tree: oriented boxes and enclosing ellipsoids along the same axes.
struct Level {
  int64_t count, children, leaves;  // boxes, boxes for each of the level above, leaves of each box
  double *center, *axes, *half, *semi, *reach;  // (B, D), (B, D, D), (B, D), (B, D), (B,)
};

// The arguments for a kd-tree, as in truncation/tree.py; library.py declares the same fields.
struct TreeCall {
  int32_t double_points, threads;
  int64_t rows, dimensions, depth, levels;
  const void* x;          // (N, D)
  void* points;           // (M, D), the result, or sorted points if rank is null
  int64_t* rank;          // (N,) rows of the points in the result; null for boxes only
  const int64_t* starts;  // (leaves + 1,) first row of each leaf
  const Level* level;     // from the coarsest one to the leaves; their arrays are results
  const int32_t* stop;    // becomes nonzero when the call is to end early
};

// Measures of the leaves for each of the levels above them.
enum Measured : int32_t { MOMENTS, EXTREMES, RADII };
struct Extents {
  double *low, *high, *radius;  // (leaves, levels, D), (leaves, levels, D), (leaves, levels)
};

// Candidate lists of some boxes of a level, one after the other; memory of malloc.
struct Lists {
  int64_t count, total;
  int64_t *boxes, *index, *lengths;
  double* pruned;  // log of the sum of the exponentials that each list omits, nats
};

// The arguments of the search for candidate lists, as in truncation/bounds.py; library.py declares the same fields.
struct ListCall {
  int32_t full, spherical, single, threads;
  int64_t components, dimensions, levels;
  const Level* level;
  const double *limit, *offsets, *means, *factor, *center, *sizes;  // (leaves,), (K,), (K, D), (K, ...), (D,), (K,)
  int64_t factor_stride;
  Lists result;
};

struct Kernel {
  // Numbers in Group::moments for one component.
  int64_t (*sums)(const Call&);
  // Position in a component's sums of the product of residuals i >= j, where i = D stands for one; other families: i == j or i = D;
  // spherical ones have the same place for each i == j < D.
  int64_t (*place)(const Call&, int64_t i, int64_t j);
  Status (*run)(const Call&, const Parameters&, Group&, Memory&);
  // The lists of the children of the parents from ``from`` to ``to``.
  Status (*refine)(const ListCall&, const Level&, bool last, const Lists& parents, int64_t from, int64_t to, Lists& children);
  // Eigenvectors of a symmetric matrix (D, D), in the rows of the second one; eigenvalues replace the diagonal of the first one.
  void (*eigenvectors)(double*, double*, int64_t D);
  // The eigenvector of the largest eigenvalue, and this eigenvalue (boxes.hpp).
  double (*longest_axis)(const double* A, double* axis, int64_t D, double* space);
  // How much a component magnifies relative rounding errors; the inverse of a Cholesky factor; points times an upper triangular matrix;
  // the scatter of points (matrices.hpp).
  double (*magnification)(const double* U, int64_t D, double* space);
  bool (*invert)(double* matrix, double* inverse, int64_t D, double noise, double* factors);
  void (*multiply)(const double* x, const double* matrix, double* result, int64_t M, int64_t D, double* space);
  void (*scatter)(const double* z, const double* weights, double* sums, int64_t M, int64_t D, int64_t stride);
  // Measures the points of one leaf.
  Status (*measure)(const TreeCall&, const Extents&, Measured, int64_t leaf);
  // Splits a multiple of 16 numbers into three float16 digits (halves.hpp).
  void (*split)(const double*, int64_t count, uint16_t*, uint16_t*, uint16_t*);
};
