// Threads that wait for work, since starting fifteen threads for each call takes longer than many calls do.
#pragma once
#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#include <signal.h>
#endif

namespace {

// The threads of this process. Several threads may call it at the same time, also from within work. As threads of OpenMP do, the
// threads keep the affinity and the rounding mode of the call that started them.
class Team {
 public:
  // Calls work(data, 0) in this thread, and work(data, t) with t = 1, 2, ... in at most ``helpers`` others that become free before
  // that ends. Returns when all have ended. The work must not throw.
  static void run(int helpers, void (*work)(void*, int), void* data) {
    Team& team = own();
    Job job{work, data, helpers};
    {
      std::lock_guard<std::mutex> held(team.lock);
      team.jobs.push_back(&job);
      int demand = 0;
      for (const Job* each : team.jobs) demand += each->wanted - each->begun;
      // Calls that are made at the same time, or within others, share some threads.
      team.most = std::max(team.most, 2 * helpers);
      team.grow(std::min(demand - team.idle, team.most - team.size));
    }
    for (int i = 0; i < helpers; i++) team.wake.notify_one();
    work(data, 0);
    std::unique_lock<std::mutex> held(team.lock);
    team.jobs.erase(std::find(team.jobs.begin(), team.jobs.end(), &job));
    job.end.wait(held, [&] { return job.running == 0; });
  }

 private:
  struct Job {
    void (*work)(void*, int);
    void* data;
    int wanted, begun = 0, running = 0;
    std::condition_variable end{};
  };

  std::mutex lock;
  std::condition_variable wake;
  std::vector<Job*> jobs;
  int idle = 0, size = 0, most = 0;

  // The team of this process. It is never deleted, since its threads wait until the process ends; a process that was forked has
  // none of the threads, and begins a new team.
  static Team& own() {
    static Team* team = nullptr;
    static const bool prepared = [] {
      team = new Team;
#ifndef _WIN32
      pthread_atfork(nullptr, nullptr, [] { team = new Team; });
#endif
      return true;
    }();
    (void)prepared;
    return *team;
  }

  // Starts threads that are idle at first; fewer if the system has no more, so that the others do the work.
  void grow(int count) {
#ifndef _WIN32
    // Signals are for the threads of the program.
    sigset_t all, before;
    sigfillset(&all);
    if (count > 0) pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
    int started = 0;
    try {
      for (; started < count; started++) std::thread(&Team::serve, this).detach();
    } catch (const std::exception&) {
    }
    idle += started, size += started;
#ifndef _WIN32
    if (count > 0) pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
  }

  // The loop of a thread, which is counted as idle when it begins.
  void serve() {
    std::unique_lock<std::mutex> held(lock);
    for (;;) {
      const auto found = std::find_if(jobs.begin(), jobs.end(), [](const Job* job) { return job->begun < job->wanted; });
      if (found == jobs.end()) {
        wake.wait(held);
        continue;
      }
      Job& job = **found;
      const int thread = ++job.begun;
      job.running++, idle--;
      held.unlock();
      job.work(job.data, thread);
      held.lock();
      idle++;
      if (--job.running == 0) job.end.notify_one();
    }
  }
};

}  // namespace
