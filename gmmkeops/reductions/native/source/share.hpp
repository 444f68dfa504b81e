// Work that is shared between threads.
#pragma once
#include <atomic>
#include <exception>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#include "interface.hpp"

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
    } catch (const std::bad_alloc&) {
      status = OUT_OF_MEMORY;
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads && size_t(t) < count; t++) {
    try {
      others.emplace_back(run, t);
    } catch (const std::exception&) {
      break;  // the system has no more threads: those that it has do the work
    }
  }
  run(0);
  for (std::thread& other : others) other.join();
  return Status(int(status));
}

}  // namespace
