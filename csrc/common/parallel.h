// parallel_for: tasks 0 … count-1 on the threads that PyTorch uses, or on a pool of our own (parallel.cpp).
#pragma once

#include <cstdint>

namespace fastproto {

// The address of GOMP_parallel of the OpenMP library that PyTorch has loaded, 0 for none.
void set_openmp_parallel(uintptr_t address);

// Runs task(context, 0 … count-1) and returns when all are done. Which thread runs a task is open, so a task must not depend on
// it. The first exception of a task ends the rest and is thrown again here.
void run_tasks(int64_t count, int threads, void (*task)(const void*, int64_t), const void* context);

template <typename Task> void parallel_for(int64_t count, int threads, const Task& task) {
  run_tasks(count, threads, [](const void* context, int64_t i) { (*static_cast<const Task*>(context))(i); }, &task);
}

}  // namespace fastproto
