// The threads behind parallel_for: PyTorch's, or a pool of our own.
//
// Two pools in one process fight for the cores: PyTorch's OpenMP threads spin for milliseconds after each of its ops, and
// leave ours no core. Python therefore hands over GOMP_parallel of the OpenMP library that PyTorch has loaded (linking it
// here would load a second copy). Where there is none, and in a child after fork(), which OpenMP does not survive, the
// pool serves. Tasks are handed out by an atomic counter. A call that finds the pool busy (another Python thread is in it)
// runs its tasks itself. After fork() the child has no threads: it forgets the pool and makes a new one at its first call. A
// waiting thread of the pool spins for some microseconds before it sleeps: waking a core costs more than a small op.
#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include <pthread.h>

namespace fastproto {
namespace {

// What the threads of one call share.
class Tasks {
 public:
  Tasks(int64_t count, void (*task)(const void*, int64_t), const void* context)
      : count_(count), task_(task), context_(context) {}

  void work() {
    for (int64_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) {
      try {
        task_(context_, i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
        next_.store(count_);
      }
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const int64_t count_;
  void (*const task_)(const void*, int64_t);
  const void* const context_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr error_;
};

// void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags)
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<OpenMpParallel>& openmp_parallel() {
  static std::atomic<OpenMpParallel> function{nullptr};
  return function;
}

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

  // Has this thread and `helpers` of the pool work on the tasks.
  void run(Tasks& tasks, int helpers) {
    std::unique_lock<std::mutex> busy(busy_, std::defer_lock);
    if (!busy.try_lock()) return tasks.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; started_ < helpers; ++started_) std::thread(&ThreadPool::help, this, started_).detach();
      tasks_ = &tasks;
      invited_ = helpers;
      working_ = helpers;
      ++round_;
    }
    wake_.notify_all();
    tasks.work();
    spin([this] { return working_.load() == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return working_ == 0; });
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
      tasks_->work();
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

  std::mutex busy_;   // held for the whole of a call
  std::mutex mutex_;  // guards all below
  std::condition_variable wake_, done_;
  Tasks* tasks_ = nullptr;
  int started_ = 0, invited_ = 0;
  std::atomic<int> working_{0};
  std::atomic<uint64_t> round_{0};
};

}  // namespace

void set_openmp_parallel(uintptr_t address) {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { openmp_parallel().store(nullptr); }); });
  openmp_parallel().store(reinterpret_cast<OpenMpParallel>(address));
}

void run_tasks(int64_t count, int threads, void (*task)(const void*, int64_t), const void* context) {
  Tasks tasks(count, task, context);
  const int wanted = static_cast<int>(count < threads ? count : threads);
  if (wanted <= 1) {
    tasks.work();
  } else if (const OpenMpParallel openmp = openmp_parallel().load()) {
    openmp([](void* shared) { static_cast<Tasks*>(shared)->work(); }, &tasks, wanted, 0);
  } else {
    ThreadPool::instance().run(tasks, wanted - 1);
  }
  tasks.rethrow();
}

}  // namespace fastproto
