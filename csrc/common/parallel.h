// parallel_for: tasks 0 … count-1 on a pool of threads that outlives the call.
//
// A pool of our own rather than OpenMP, because PyTorch brings its own copy of the OpenMP runtime and two of them in one
// process keep two sets of spinning threads. Tasks are handed out by an atomic counter: which thread runs a task is open,
// so a task must not depend on it. A call that finds the pool busy (another Python thread is in it) runs its tasks itself.
// A waiting thread spins for some microseconds before it sleeps: waking a core costs more than a small op.
// After fork() the child has no threads: it forgets the pool and makes a new one at its first call.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

#include <pthread.h>

namespace fastproto {

class ThreadPool {
 public:
  static ThreadPool& instance() {
    static std::once_flag once;
    std::call_once(once, [] {
      pool() = new ThreadPool;
      pthread_atfork(nullptr, nullptr, [] { pool() = new ThreadPool; });
    });
    return *pool();
  }

  void run(int64_t count, int threads, const std::function<void(int64_t)>& task) {
    std::unique_lock<std::mutex> busy(busy_, std::defer_lock);
    if (threads <= 1 || count <= 1 || !busy.try_lock()) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    const int helpers = static_cast<int>(count < threads ? count : threads) - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (started_ < helpers) std::thread(&ThreadPool::help, this, started_++).detach();
      task_ = &task;
      count_ = count;
      next_.store(0);
      error_ = nullptr;
      invited_ = helpers;
      working_ = helpers;
      ++round_;
    }
    wake_.notify_all();
    work();
    spin([this] { return working_.load() == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return working_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // Never destroyed: its threads would outlive it at the end of the process.
  static ThreadPool*& pool() {
    static ThreadPool* pool = nullptr;
    return pool;
  }

  void help(int me) {
    uint64_t seen = 0;
    for (;;) {
      spin([&] { return round_.load() != seen; });
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (me >= invited_) continue;
      }
      work();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--working_ == 0) done_.notify_one();
    }
  }

  template <typename Done> static void spin(Done done) {
    for (int turn = 0; turn < 2000 && !done(); ++turn) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  void work() {
    for (int64_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) {
      try {
        (*task_)(i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
        next_.store(count_);
      }
    }
  }

  std::mutex busy_;   // held for the whole of a call
  std::mutex mutex_;  // guards all below
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* task_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
  int started_ = 0, invited_ = 0;
  std::atomic<int> working_{0};
  std::atomic<uint64_t> round_{0};
  std::exception_ptr error_;
};

inline void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  ThreadPool::instance().run(count, threads, task);
}

}  // namespace fastproto
