// Work that is shared between threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <new>
#include <type_traits>

#include "interface.hpp"
#include "team.hpp"

namespace {

// Runs work(0), ..., work(count - 1) on several threads, until one of them does not end with DONE. Work that takes two arguments
// is also given the number of its thread.
template <class Work> Status share(int threads, size_t count, Work work) {
  std::atomic<size_t> next{0};
  std::atomic<int> status{DONE};
  auto run = [&](int thread) {
    try {
      for (size_t i; status == DONE && (i = next++) < count;) {
        Status found;
        if constexpr (std::is_invocable_v<Work, size_t, int>) found = work(i, thread);
        else found = work(i);
        if (found != DONE) status = found;
      }
    } catch (...) {
      // There are no other exceptions than std::bad_alloc, and none may leave a thread.
      status = OUT_OF_MEMORY;
    }
  };
  const int helpers = int(std::min<size_t>(size_t(std::max(threads, 1)), count)) - 1;
  if (helpers > 0) Team::run(helpers, [](void* data, int thread) { (*static_cast<decltype(run)*>(data))(thread); }, &run);
  else run(0);
  return Status(int(status));
}

// Multiplications for which another thread saves time, and those that take as long as an exponential or a logarithm.
constexpr double PARALLEL_WORK = 1e5, EXPONENTIAL = 20;

// True if work has been done; false if it has ended early.
inline bool complete(Status status) {
  if (status == OUT_OF_MEMORY) throw std::bad_alloc();
  return status == DONE;
}

// Calls work(first, last) for ranges of ``count`` items that take a number of multiplications each, on as many threads as save
// time. Results must not depend on the ranges.
template <class Work> Status share_ranges(int threads, int64_t count, double multiplications, Work work) {
  const double most = multiplications * double(count) / PARALLEL_WORK + 1;
  threads = int(std::min<double>(threads, most));
  const int64_t parts = threads > 1 ? std::min<int64_t>(count, 4 * threads) : 1;
  return share(threads, size_t(parts), [&](size_t part) { return work(count * int64_t(part) / parts, count * int64_t(part + 1) / parts); });
}

}  // namespace
