// How the work of a call is divided among PyTorch's threads.
#pragma once
#include "ops/core/torch_headers.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <vector>

namespace dlkernels {

// A fork copies no thread but its own, and GNU OpenMP would wait for the forking thread's others
// forever. So they are ended before, and parent and child start new ones when they need them. Where
// they can't be (inside a parallel region, or it is another OpenMP), the child's ops run on the
// thread that is left.
#pragma weak omp_pause_resource_all
inline thread_local bool keeps_threads = false;
inline std::atomic<bool> lost_threads{false};
inline const int watches_forks = pthread_atfork(
    [] { keeps_threads = !omp_pause_resource_all || omp_pause_resource_all(omp_pause_hard) != 0; },
    nullptr,
    [] {
      if (keeps_threads) lost_threads = true;
    });

// f(begin, end) over [0, n), in chunks. A thread takes the chunks of its own share in order, so
// that it meets the same memory in one op after the other, and then what is left of the others':
// one that the system holds up does not hold up the rest. Less than `grain`, about 20 us of work,
// is not worth a fork.
template <class F>
void parallel_chunks(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (n + grain - 1) / grain);
  if (threads <= 1 || at::in_parallel_region() || lost_threads) return f(int64_t{0}, n);
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t chunk = std::max<int64_t>(1, grain / 4), chunks = (n + chunk - 1) / chunk;
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next = chunks * i / threads;
    shares[i].end = chunks * (i + 1) / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end + threads - 1; ++i) {
      Share& share = shares[i % threads];
      for (int64_t c; (c = share.next++) < share.end;) f(c * chunk, std::min(n, (c + 1) * chunk));
    }
  });
}

}  // namespace dlkernels
