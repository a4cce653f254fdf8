#include "pool.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() { std::atomic_signal_fence(std::memory_order_seq_cst); }
#endif

// Spin rounds before a thread parks, about 20 ns each. Barriers inside a forward come every few us and are met spinning;
// between two forwards the threads soon sleep and leave the cores to the rest of the server.
static constexpr int kIdleSpins = 200;
// At barriers the limit adapts: a wait that runs into it means that somebody lost a core to another process, and spinning
// keeps that very core from him. Measured, with two busy processes of low priority beside: fixed limits of 2,000, 200,000 and 20
// gave 40, 120 and 10 ms where the idle machine takes 4; without contention 20 costs a futex call per barrier.
static constexpr int kMostSpins = 1000, kFewestSpins = 20, kSpinGain = 1;

pl_pool::pl_pool(int threads) : threads_(threads < 1 ? 1 : threads), spins_(kMostSpins) {
    for (int i = 1; i < threads_; i++) workers_.emplace_back([this, i] { work(i); });
}

pl_pool::~pl_pool() {
    stopping_ = true;
    jobs_.fetch_add(1, std::memory_order_release);
    jobs_.notify_all();
    for (auto &worker : workers_) worker.join();
}

bool pl_pool::spin(const std::atomic<uint32_t> &word, uint32_t old, int rounds) {
    for (int i = 0; i < rounds; i++) {
        if (word.load(std::memory_order_acquire) != old) return true;
        relax();
    }
    return false;
}

void pl_pool::park(std::atomic<uint32_t> &word, uint32_t old) {
    while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

void pl_pool::wait_at_barrier(uint32_t generation) {
    const int rounds = spins_.load(std::memory_order_relaxed);
    if (spin(generation_, generation, rounds)) {
        if (rounds < kMostSpins) spins_.store(rounds + kSpinGain, std::memory_order_relaxed);
        return;
    }
    spins_.store(rounds / 2 > kFewestSpins ? rounds / 2 : kFewestSpins, std::memory_order_relaxed);
    park(generation_, generation);
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
        wait_at_barrier(generation);
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
        if (!spin(jobs_, seen, kIdleSpins)) park(jobs_, seen);
        seen++;
        if (stopping_) return;
        (*job_)(thread);
        barrier();
    }
}
