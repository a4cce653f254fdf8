#include "pool.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() { std::atomic_signal_fence(std::memory_order_seq_cst); }
#endif

// Rounds of the spin loop before a thread parks: about 50 us. Barriers inside a forward come every few us, so they
// are met spinning; between two forwards the threads sleep and leave the cores to the rest of the server.
static constexpr int kSpins = 2000;

pl_pool::pl_pool(int threads) : threads_(threads < 1 ? 1 : threads) {
    for (int i = 1; i < threads_; i++) workers_.emplace_back([this, i] { work(i); });
}

pl_pool::~pl_pool() {
    stopping_ = true;
    jobs_.fetch_add(1, std::memory_order_release);
    jobs_.notify_all();
    for (auto &worker : workers_) worker.join();
}

void pl_pool::spin_until_changed(std::atomic<uint32_t> &word, uint32_t old) {
    for (int i = 0; i < kSpins; i++) {
        if (word.load(std::memory_order_acquire) != old) return;
        relax();
    }
    while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

void pl_pool::barrier() {
    if (threads_ == 1) {
        next_.store(0, std::memory_order_relaxed);
        return;
    }
    uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        next_.store(0, std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
    } else {
        spin_until_changed(generation_, generation);
    }
}

void pl_pool::run(const std::function<void(int)> &job) {
    job_ = &job;
    next_.store(0, std::memory_order_relaxed);
    jobs_.fetch_add(1, std::memory_order_release);
    jobs_.notify_all();
    job(0);
    barrier();  // nobody still uses `job`
}

void pl_pool::work(int thread) {
    uint32_t seen = 0;
    for (;;) {
        spin_until_changed(jobs_, seen);
        seen++;
        if (stopping_) return;
        (*job_)(thread);
        barrier();
    }
}
