// The driver: packs the components, shares groups of rows between threads, and adds their sums in order.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "digits.hpp"
#include "interface.hpp"
#include "clusters.hpp"
#include "columns.hpp"
#include "kmeans.hpp"
#include "pairs.hpp"
#include "records.hpp"
#include "rounds.hpp"
#include "seeds.hpp"
#include "sequence.hpp"
#include "share.hpp"
#include "tree.hpp"

#if defined(__x86_64__)
namespace avx512 { extern const Kernel kernel; }
namespace avx2 { extern const Kernel kernel; }
#endif
namespace base { extern const Kernel kernel; }

namespace {

constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

// Numbers whose squares, and products of squares with weights, stay in the range of float32.
constexpr double SMALLEST = 1e-12, LARGEST = 1e12;

// Largest factor by which a component may magnify the rounding errors of float32: the error of an exponent e stays below about
// 1e-5 max(1, |e|) nats.
constexpr double MAGNIFICATION = 16;

// Numbers of components that are prepared once for all of their pairs.
constexpr int64_t PREPARED = int64_t(1) << 24;

// Largest error of -mu u by one rounding, in bits of an exponent at a typical point.
constexpr double EXPANDED = 32;

// Rows and multiplications of a group, the fewest rows of one of several groups, the largest number of groups, and the numbers in
// the sums of all: 32 MiB, which malloc keeps for the next call.
constexpr int64_t GROUP_ROWS = 4096, FEWEST = 512, GROUPS = 64, SUMS = int64_t(1) << 22;
constexpr double GROUP_WORK = 1e8;

// Several groups are a multiple of these, so that two and four threads get equal parts.
constexpr int64_t EVEN = 4;

// Rows by which a group of all rows begins: those of a block of vectors of every instruction set.
constexpr int64_t STEP = 64;

// Multiplications for which another thread saves time.
constexpr double WORK = 2e6;

// Numbers in the sums of all groups from which they are merged on several threads.
constexpr size_t PARALLEL = 500000;

// Upper-triangular U with the same |U'z| as a matrix, by Householder reflections of the columns; ``U`` is overwritten.
void triangular(double* U, int64_t D) {
  bool done = true;
  for (int64_t i = 1; i < D; i++) for (int64_t j = 0; j < i; j++) done &= U[i * D + j] == 0;
  if (done) return;
  // |U'z| is kept by U Q. Rows are reduced from the last one on, so that entries left of the diagonal vanish.
  std::vector<double> v(D);
  for (int64_t i = D - 1; i > 0; i--) {
    double largest = 0;
    for (int64_t j = 0; j <= i; j++) largest = std::max(largest, std::abs(U[i * D + j]));
    if (!(largest > 0) || !std::isfinite(largest)) continue;
    double norm = 0;
    for (int64_t j = 0; j <= i; j++) v[j] = U[i * D + j] / largest, norm += v[j] * v[j];
    norm = std::sqrt(norm);
    v[i] += v[i] > 0 ? norm : -norm;
    double length = 0;
    for (int64_t j = 0; j <= i; j++) length += v[j] * v[j];
    if (!(length > 0)) continue;
    for (int64_t r = 0; r <= i; r++) {
      double along = 0;
      for (int64_t j = 0; j <= i; j++) along += U[r * D + j] * v[j];
      along *= 2 / length;
      for (int64_t j = 0; j <= i; j++) U[r * D + j] -= along * v[j];
    }
    for (int64_t j = 0; j < i; j++) U[i * D + j] = 0;
  }
}

struct Driver {
  const Call& call;
  const Kernel& kernel;
  const int64_t K, D;
  const bool full, doubles;
  Parameters parameters{};
  std::vector<double> center;       // rounded to the numbers of the arithmetic
  std::unique_ptr<float[]> single;
  std::unique_ptr<double[]> wide;
  std::vector<uint8_t> is_wide;
  int64_t stride;

  explicit Driver(const Call& call, const Kernel& kernel)
      : call(call), kernel(kernel), K(call.components), D(call.dimensions), full(call.family == FULL),
        doubles(call.double_points || call.double_arithmetic), center(call.center, call.center + call.dimensions),
        stride(full ? 2 * D + D * (D + 1) / 2 + 1 : call.family == SPHERICAL ? 2 * D + 2 : 3 * D + 1) {
    if (!doubles) for (double& c : center) c = float(c);
  }

  double mean(int64_t k, int64_t d) const { return call.means[k * D + d] + (call.center[d] - center[d]); }
  // The mean that residuals are taken about.
  double rounded(int64_t k, int64_t d) const {
    const double m = mean(k, d);
    return doubles || is_wide[k] ? m : double(float(m));
  }

  void pack() {
    is_wide.assign(K, 0);
    wide.reset(new double[K * stride]);
    if (!doubles) single.reset(new float[K * stride]);
    std::atomic<bool> any_wide{false}, expanded{!full && call.request != POINT_GRADIENT};
    const bool repeated = call.factor_stride == 0;
    const double work = double(repeated ? 1 : K) * D * D * (full ? D : 1);
    const int64_t parts = work > WORK ? std::min<int64_t>(K, 4 * call.threads) : 1;
    auto prepare = [&](int64_t k, std::vector<double>& U, std::vector<double>& space) {
      load(k, U);
      return full && !doubles ? kernel.magnification(U.data(), D, space.data()) : 1;
    };
    std::vector<double> common(full ? D * D : D), scratch(full ? D * D + D : 0);
    const double magnified = repeated ? prepare(0, common, scratch) : 1;
    const Status status = share(int(std::min<int64_t>(call.threads, parts)), size_t(parts), [&](size_t part) {
      std::vector<double> space(repeated ? 0 : scratch.size()), own(repeated ? 0 : common.size());
      for (int64_t k = K * part / parts; k < int64_t(K * (part + 1) / parts); k++) {
        const double known = repeated ? magnified : prepare(k, own, space);
        const std::vector<double>& U = repeated ? common : own;
        if (!doubles) is_wide[k] = needs_doubles(k, U, known);
        if (is_wide[k]) any_wide = true;
        if (expanded && !is_wide[k]) {
          double error = 0;
          for (int64_t d = 0; d < D; d++) { const double e = mean(k, d) * U[d]; error += e * e; }
          if (!(error <= EXPANDED * EXPANDED)) expanded = false;
        }
        double* packed = &wide[k * stride];
        write(k, U, packed);
        if (!doubles && !is_wide[k]) std::copy(packed, packed + stride, &single[k * stride]);
      }
      return DONE;
    });
    if (status != DONE) throw std::bad_alloc();
    if (expanded) expand();
    parameters = {{single.get(), stride}, {wide.get(), stride}, is_wide.data(), any_wide, deepest(), expanded};
  }

  // Smallest log-sum-exp of a row that float32 evaluates: the errors of much lower exponents are not small any more.
  double deepest() const {
    if (doubles) return call.double_points ? -std::numeric_limits<double>::max() : -double(std::numeric_limits<float>::max());
    const auto [least, most] = std::minmax_element(call.offsets, call.offsets + K);
    // Points of wide components in many dimensions are this much lower than those of narrow ones.
    const double spread = std::min(*most - *least, 12.0 * D);
    return std::max(*most - spread - (300.0 + 4.0 * D), -1e38);
  }
  void load(int64_t k, std::vector<double>& U) const {
    const double* from = call.factor + k * call.factor_stride;
    for (int64_t i = 0; i < int64_t(U.size()); i++) U[i] = call.family == SPHERICAL ? from[0] : from[i];
    if (full) triangular(U.data(), D);
  }
  // Whether float32 is too inaccurate for a component, which magnifies errors by a factor.
  bool needs_doubles(int64_t k, const std::vector<double>& U, double magnified) const {
    bool fine = magnified <= MAGNIFICATION;
    for (int64_t d = 0; d < D; d++) {
      const double u = std::abs(U[full ? d * D + d : d]), m = std::abs(mean(k, d));
      fine = fine && u >= SMALLEST && u <= LARGEST && m <= LARGEST;
    }
    return !fine;
  }
  // The numbers of a component, as described at Packed.
  void write(int64_t k, const std::vector<double>& U, double* out) const {
    const double scale = std::sqrt(0.5 * LOG2E);
    for (int64_t d = 0; d < D; d++) out[d] = rounded(k, d);
    double* at = &out[2 * D];
    if (full) {
      // The rows r of U' in panels: U_jr for j before the panel, then its triangle.
      for (int64_t p = 0, end; p < D; p = end) {
        end = p + panel_height(D - p);
        for (int64_t j = 0; j < end; j++) for (int64_t r = std::max(p, j); r < end; r++) *at++ = U[j * D + r] * scale;
      }
      for (int64_t r = 0; r < D; r++) {
        double sum = 0;
        for (int64_t j = 0; j <= r; j++) sum += U[j * D + r] * (rounded(k, j) - mean(k, j));
        out[D + r] = sum * scale;
      }
    } else if (call.family == SPHERICAL) {
      for (int64_t d = 0; d < D; d++) out[D + d] = rounded(k, d) - mean(k, d);
      *at++ = U[0] * scale * (U[0] * scale);
    } else {
      for (int64_t d = 0; d < D; d++) at[d] = U[d] * scale, out[D + d] = at[d] * (rounded(k, d) - mean(k, d));
      if (!doubles && !is_wide[k]) for (int64_t d = 0; d < D; d++) at[d] = float(at[d]);
      at += D;
    }
    *at = call.offsets[k] * LOG2E;
  }
  // Lets the remainders of diagonal components hold -mu u.
  void expand() {
    if (call.family == SPHERICAL) return;
    for (int64_t k = 0; k < K; k++) for (int64_t d = 0; d < D; d++) {
      if (doubles || is_wide[k]) { if (doubles) wide[k * stride + D + d] = -mean(k, d) * wide[k * stride + 2 * D + d]; }
      else single[k * stride + D + d] = float(-mean(k, d) * double(single[k * stride + 2 * D + d]));
    }
  }
};

// Multiplications of a call.
double work_of(const Call& call) {
  double pairs = double(call.rows) * call.components;
  if (call.ranges) {
    pairs = 0;
    for (int64_t s = 0; s < call.ranges; s++)
      pairs += double(call.range[2 * s + 1] - call.range[2 * s]) * (call.pointer[call.owner[s] + 1] - call.pointer[call.owner[s]]);
  }
  return pairs * call.dimensions * (call.family == FULL ? 0.5 * call.dimensions + 4 : 4);
}

// Cuts the rows, or the row ranges of the schedule, into groups whose sums are added in order, so that results do not depend on
// the number of threads.
std::vector<Group> cut(const Call& call, int64_t sums) {
  const bool whole = call.ranges == 0;
  const int64_t items = whole ? call.rows : call.ranges;
  int64_t rows = whole ? call.rows : 0;
  for (int64_t r = 0; r < call.ranges; r++) rows += call.range[2 * r + 1] - call.range[2 * r];
  const double least = std::max(double(rows) / GROUP_ROWS, work_of(call) / GROUP_WORK);
  int64_t count = int64_t(std::ceil(std::min({least, double(rows) / FEWEST, double(GROUPS)})));
  // Sums of two groups, and of eight of many rows each, may take more memory.
  const int64_t room = call.request >= SOFT && call.request <= STOCHASTIC ? SUMS / (sums * call.components) : GROUPS;
  count = std::max<int64_t>(1, std::min(count, std::max({int64_t(2), std::min<int64_t>(8, rows / GROUP_ROWS), room})));
  const int64_t even = (count + EVEN - 1) / EVEN * EVEN;
  if (count > 2) count = even <= room ? even : std::max<int64_t>(2, even - (even > count ? EVEN : 0));
  std::vector<Group> groups;
  double work = 0;
  auto cost = [&](int64_t s) {
    const int64_t owner = call.owner[s];
    return double(call.range[2 * s + 1] - call.range[2 * s]) * (call.pointer[owner + 1] - call.pointer[owner] + 4);
  };
  if (!whole) for (int64_t s = 0; s < items; s++) work += cost(s);
  int64_t first = 0;
  double done = 0;
  for (int64_t g = 1; g <= count && first < items; g++) {
    int64_t last = first;
    if (whole) last = items * g / count / STEP * STEP;
    else while (last < items && (done < work * g / count || last == first)) done += cost(last++);
    if (g == count) last = items;
    groups.push_back({first, last, nullptr, 0.0, 0});
    first = last;
  }
  return groups;
}

// Adds the sums of all groups in order, and converts them to moments about the means.
void merge(const Driver& driver, const std::vector<Group>& groups, int64_t sums, int64_t first, int64_t last) {
  const Call& call = driver.call;
  const int64_t D = driver.D;
  const Kernel& kernel = driver.kernel;
  std::vector<double> total(sums), shift(D), s1(D);
  std::vector<int64_t> linear(D), square(driver.full ? D * (D + 1) / 2 : D);
  const int64_t last_place = kernel.place(call, D, D);
  for (int64_t i = 0, n = 0; i < D; i++) {
    linear[i] = kernel.place(call, D, i);
    if (!driver.full) square[i] = kernel.place(call, i, i);
    else for (int64_t j = 0; j <= i; j++) square[n++] = kernel.place(call, i, j);
  }
  for (int64_t k = first; k < last; k++) {
    std::fill(total.begin(), total.end(), 0.0);
    for (const Group& group : groups) for (int64_t i = 0; i < sums; i++) total[i] += group.moments[k * sums + i];
    for (double& value : total) value *= call.unit;
    const double s0 = call.S0[k] = total[last_place];
    for (int64_t d = 0; d < D; d++) {
      shift[d] = driver.rounded(k, d) - driver.mean(k, d);
      s1[d] = total[linear[d]];
      call.S1[k * D + d] = s1[d] + s0 * shift[d];
    }
    if (driver.full)
      for (int64_t i = 0, n = 0; i < D; i++) for (int64_t j = 0; j <= i; j++)
        call.S2[(k * D + i) * D + j] = call.S2[(k * D + j) * D + i] =
            total[square[n++]] + shift[i] * s1[j] + s1[i] * shift[j] + s0 * shift[i] * shift[j];
    else {
      if (call.family == SPHERICAL) call.S2[k] = total[square[0]];
      for (int64_t d = 0; d < D; d++) {
        const double moved = shift[d] * (2 * s1[d] + s0 * shift[d]);
        if (call.family == DIAGONAL) call.S2[k * D + d] = total[square[d]] + moved;
        else call.S2[k] += moved;
      }
    }
  }
}

// Releases the memory of a thread.
struct Space {
  Memory memory{nullptr, 0};
  ~Space() { free(memory.bytes); }
};

Status evaluate(const Call& given, const Kernel& kernel) {
  Driver driver(given, kernel);
  driver.pack();
  // Points are relative to the rounded center.
  Call call = given;
  call.center = driver.center.data();
  const int64_t sums = kernel.sums(call);
  std::vector<Group> groups = cut(call, sums);
  const bool moments = call.request >= SOFT && call.request <= STOCHASTIC;
  std::unique_ptr<double[]> space;
  if (moments) {
    space.reset(new double[groups.size() * sums * call.components]);
    for (size_t g = 0; g < groups.size(); g++) groups[g].moments = &space[g * sums * call.components];
  }
  const int threads = int(std::clamp<double>(work_of(call) / WORK, 1, std::min<double>(call.threads, groups.size())));
  std::vector<Space> spaces(threads);
  const Status status = share(threads, groups.size(), [&](size_t g, int thread) {
    // The thread that needs new memory first clears it, since the system then clears it, too.
    if (moments) std::fill_n(groups[g].moments, sums * call.components, 0.0);
    return kernel.run(call, driver.parameters, groups[g], spaces[thread].memory);
  });
  if (status != DONE) return status;
  double total = 0;
  *call.odd = 0;
  for (const Group& group : groups) total += group.total, *call.odd += group.odd;
  if (call.total) *call.total = total * call.unit;
  if (moments) {
    const int64_t K = call.components, parts = groups.size() * sums * K > PARALLEL ? threads : 1;
    const Status merged = share(int(parts), size_t(parts), [&](size_t p) {
      merge(driver, groups, sums, K * p / parts, K * (p + 1) / parts);
      return DONE;
    });
    if (merged != DONE) return merged;
  }
  *call.doubles = std::count(driver.is_wide.begin(), driver.is_wide.end(), 1);
  return DONE;
}

void release(Lists& lists) {
  free(lists.boxes), free(lists.index), free(lists.lengths), free(lists.pruned);
  lists = {};
}

// Candidate lists from the root of the tree down to the leaves; the nodes of a level are shared between threads.
Status search(ListCall& call, const Kernel& kernel) {
  std::vector<int64_t> everything(call.components);
  for (int64_t k = 0; k < call.components; k++) everything[k] = k;
  int64_t root = 0, length = call.components;
  double nothing = -INFINITY;
  Lists parents{1, length, &root, everything.data(), &length, &nothing};
  bool owned = false;
  for (int64_t l = 0; l < call.levels; l++) {
    const Level& level = call.level[l];
    const int64_t workers = std::clamp<int64_t>(parents.total * level.children / 4096, 1, std::min<int64_t>(call.threads, parents.count));
    std::vector<Lists> parts(workers);
    // Parents are cut where their lists have about equal lengths.
    std::vector<int64_t> cuts{0};
    for (int64_t p = 0, done = 0; p < parents.count && int64_t(cuts.size()) < workers; p++) {
      done += parents.lengths[p];
      if (done * workers >= parents.total * int64_t(cuts.size())) cuts.push_back(p + 1);
    }
    while (int64_t(cuts.size()) <= workers) cuts.push_back(parents.count);
    const Status status = share(int(workers), size_t(workers), [&](size_t w) {
      return kernel.refine(call, level, l == call.levels - 1, parents, cuts[w], cuts[w + 1], parts[w]);
    });
    Lists joined{};
    for (const Lists& part : parts) joined.count += part.count, joined.total += part.total;
    joined.boxes = (int64_t*)malloc(joined.count * 8 + 8), joined.index = (int64_t*)malloc(joined.total * 8 + 8);
    joined.lengths = (int64_t*)malloc(joined.count * 8 + 8), joined.pruned = (double*)malloc(joined.count * 8 + 8);
    const bool failed = status != DONE || !joined.boxes || !joined.index || !joined.lengths || !joined.pruned;
    int64_t at = 0, entry = 0;
    for (Lists& part : parts) {
      if (!failed) {
        std::copy(part.boxes, part.boxes + part.count, joined.boxes + at);
        std::copy(part.lengths, part.lengths + part.count, joined.lengths + at);
        std::copy(part.pruned, part.pruned + part.count, joined.pruned + at);
        std::copy(part.index, part.index + part.total, joined.index + entry);
        at += part.count, entry += part.total;
      }
      release(part);
    }
    if (owned) release(parents);
    parents = joined, owned = true;
    if (failed) {
      release(parents);
      return OUT_OF_MEMORY;
    }
  }
  call.result = parents;
  return DONE;
}

const Kernel* kernel_of(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return &avx512::kernel;
  if (isa == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::kernel;
#endif
  return isa == 0 ? &base::kernel : nullptr;
}

// Calls work, and returns its status; exceptions must not reach the caller.
template <class Work> int32_t guarded(Work work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t gmmkeops_abi() { return ABI; }

// Sizes of the calls, in the order of library.py; 0 after the last one.
EXPORT int64_t gmmkeops_size(int32_t i) {
  constexpr int64_t sizes[] = {sizeof(Call), sizeof(ListCall), sizeof(TreeCall), sizeof(StepCall), sizeof(PairCall), sizeof(RecordCall), sizeof(ExtentCall), sizeof(ParameterCall), sizeof(ClimbCall), sizeof(SeedCall), sizeof(DigitCall), sizeof(KMeansCall), sizeof(SpreadCall), sizeof(WhiteCall)};
  return i < int32_t(sizeof(sizes) / sizeof(sizes[0])) ? sizes[i] : 0;
}

// Whether this machine has an instruction set: 0 base, 1 AVX2, 2 AVX-512.
EXPORT int32_t gmmkeops_supports(int32_t isa) { return kernel_of(isa) != nullptr; }

EXPORT int32_t gmmkeops_evaluate(const Call* call, int32_t isa) {
  return guarded([&]() -> int32_t {
    return evaluate(*call, *kernel_of(isa));
  });
}

EXPORT int32_t gmmkeops_steps(StepCall* call, int32_t isa) {
  return guarded([&]() -> int32_t {
    const Kernel& kernel = *kernel_of(isa);
    return steps::run(*call, kernel, [&](const Call& sweep) { return evaluate(sweep, kernel); });
  });
}

// One EM step from the sums of an E-step that another engine has performed, which S0, S1, S2 and total of the sweep hold.
EXPORT int32_t gmmkeops_maximize(StepCall* call, int32_t isa) {
  return guarded([&]() -> int32_t {
    return steps::run(*call, *kernel_of(isa), [](const Call&) { return DONE; }, nullptr, true);
  });
}

EXPORT int32_t gmmkeops_climb(ClimbCall* call, int32_t isa) {
  return guarded([&]() -> int32_t {
    const Kernel& kernel = *kernel_of(isa);
    return clusters::run(*call, kernel, [&](const Call& sweep) { return evaluate(sweep, kernel); });
  });
}

EXPORT int32_t gmmkeops_seeds(const SeedCall* call, int32_t) {
  return guarded([&]() -> int32_t {
    seeds::choose(*call);
    return DONE;
  });
}

EXPORT int32_t gmmkeops_spread(SpreadCall* call, int32_t) {
  return guarded([&]() -> int32_t {
    if (call->double_points) columns::spread(*call, (const double*)call->points);
    else columns::spread(*call, (const float*)call->points);
    return DONE;
  });
}

EXPORT int32_t gmmkeops_whiten(WhiteCall* call, int32_t isa) {
  return guarded([&]() -> int32_t {
    const Kernel& kernel = *kernel_of(isa);
    if (call->double_points) columns::whiten(*call, (const double*)call->points, kernel);
    else columns::whiten(*call, (const float*)call->points, kernel);
    return DONE;
  });
}

EXPORT int32_t gmmkeops_kmeans(KMeansCall* call, int32_t isa) {
  return guarded([&]() -> int32_t {
    const Kernel& kernel = *kernel_of(isa);
    return kmeans::run(*call, kernel, [&](const Call& sweep) { return evaluate(sweep, kernel); });
  });
}

// Writes the records of components.
EXPORT int32_t gmmkeops_pack(RecordCall* call, int32_t) {
  return guarded([&]() -> int32_t {
    call->triangular = records::with_dimensions(call->dimensions, [&](auto D) {
      return call->double_points ? records::pack<double, D>(*call) : records::pack<float, D>(*call);
    });
    return DONE;
  });
}

// Computes the offsets and factors of a mixture.
EXPORT int32_t gmmkeops_parameters(ParameterCall* call, int32_t) {
  return guarded([&]() -> int32_t {
    call->valid = records::with_dimensions(call->dimensions, [&](auto D) { return records::prepare<D>(*call); });
    return DONE;
  });
}

// Computes bounds on parameters.
EXPORT int32_t gmmkeops_extent(ExtentCall* call, int32_t) {
  return guarded([&]() -> int32_t {
    records::measure(*call);
    return DONE;
  });
}

// Converts the sums of a GPU engine to moments.
EXPORT int32_t gmmkeops_unpack(const RecordCall* call, int32_t) {
  return guarded([&]() -> int32_t {
    records::with_dimensions(call->dimensions, [&](auto D) { records::unpack<D>(*call); });
    return DONE;
  });
}

// Writes component parameters as digits, if the kernels of digits are accurate for them.
EXPORT int32_t gmmkeops_pack_digits(DigitCall* call, int32_t isa) {
  return guarded([&]() -> int32_t {
    call->accurate = digits::pack(*call, *kernel_of(isa));
    return DONE;
  });
}

// Converts the sums of the kernels of digits to moments.
EXPORT int32_t gmmkeops_unpack_digits(const DigitCall* call, int32_t) {
  return guarded([&]() -> int32_t {
    digits::unpack(*call);
    return DONE;
  });
}

EXPORT int32_t gmmkeops_pairs(const PairCall* call, int32_t) {
  return guarded([&]() -> int32_t {
    const int64_t parts = std::clamp<int64_t>(call->pairs / 256, 1, 4096), K = call->components, D = call->dimensions;
    const int threads = int(std::min<int64_t>(call->threads, parts));
    // Components of several pairs are prepared once.
    std::vector<pairs::Component> components;
    const int64_t size = (call->full ? D * D : call->columns) + call->blocks * D * pairs::BLOCK;
    if (call->pairs > K && K * size <= PREPARED) {
      components.resize(K);
      const Status status = share(threads, size_t(parts), [&](size_t part) {
        pairs::Worker worker(*call);
        for (int64_t k = K * part / parts; k < int64_t(K * (part + 1) / parts); k++) worker.prepare(components[k], k);
        return DONE;
      });
      if (status != DONE) return status;
    }
    return share(threads, size_t(parts), [&](size_t part) {
      pairs::Worker worker(*call, components.empty() ? nullptr : &components);
      for (int64_t p = call->pairs * part / parts; p < int64_t(call->pairs * (part + 1) / parts); p++)
        call->cost[p] = worker.cost(call->pair[2 * p], call->pair[2 * p + 1]);
      return DONE;
    });
  });
}

// Sorts points into kd-tree leaves, and computes the boxes of some levels.
EXPORT int32_t gmmkeops_tree(const TreeCall* call, int32_t isa) {
  return guarded([&]() -> int32_t {
    return arrange(*call, *kernel_of(isa));
  });
}

// The result is released by ``gmmkeops_release``.
EXPORT int32_t gmmkeops_lists(ListCall* call, int32_t isa) {
  return guarded([&]() -> int32_t {
    return search(*call, *kernel_of(isa));
  });
}

EXPORT void gmmkeops_release(ListCall* call) { release(call->result); }
