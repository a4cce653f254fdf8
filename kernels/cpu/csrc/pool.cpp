#include "pool.h"

#include <algorithm>
#include <chrono>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() { std::atomic_signal_fence(std::memory_order_seq_cst); }
#endif

// Spin rounds before a thread parks, 20 ns each (Zen 4) to 50 (Emerald Rapids). Phases last a few us and their ends are met spinning; between
// two forwards the threads soon sleep and leave the cores to the rest of the server.
static constexpr int kIdleSpins = 200;
// At the end of a phase the limit adapts: a wait of kLongWait means that somebody lost a core to another process, and
// spinning keeps that very core from him. A park that was over sooner was a mistake, so the limit grows again.
static constexpr int kMostSpins = 400, kFewestSpins = 20, kSpinGain = 1, kGainAfterShortPark = 20;
static constexpr std::chrono::microseconds kLongWait{200};

static bool over(uint32_t now, uint32_t phase) { return (int32_t)(now - phase) > 0; }

pl_pool::pl_pool(int threads) : threads_(threads < 1 ? 1 : threads), spins_(kMostSpins) {
    for (int i = 1; i < threads_; i++) workers_.emplace_back([this, i] { serve(i); });
}

pl_pool::~pl_pool() {
    stopping_ = true;
    jobs_.fetch_add(1, std::memory_order_release);
    jobs_.notify_all();
    for (auto &worker : workers_) worker.join();
}

void pl_pool::wait_for_end_of(uint32_t phase, Lookahead *ahead) {
    const int rounds = spins_.load(std::memory_order_relaxed);
    uint32_t now;
    for (int i = 0; i < rounds;) {
        now = phase_.load(std::memory_order_acquire);
        if (over(now, phase)) {
            if (i && rounds < kMostSpins) spins_.store(rounds + kSpinGain, std::memory_order_relaxed);
            return;
        }
        // Fetching counts as work: a line takes 3 ns, so that a thread would park in the middle of a phase.
        if (ahead && ahead->at < ahead->end) {
            __builtin_prefetch(ahead->at, 0, 2);
            ahead->at += 64;
        } else {
            relax();
            i++;
        }
    }
    const auto parked = std::chrono::steady_clock::now();
    while (!over(now = phase_.load(std::memory_order_acquire), phase)) phase_.wait(now, std::memory_order_acquire);
    const bool lost_core = std::chrono::steady_clock::now() - parked >= kLongWait;
    spins_.store(std::clamp(lost_core ? rounds / 2 : rounds + kGainAfterShortPark, kFewestSpins, kMostSpins),
                 std::memory_order_relaxed);
}

void pl_pool::run(const std::function<void(Worker &)> &job) {
    job_ = &job;
    first_phase_ = phase_.load(std::memory_order_relaxed);
    uint32_t number = jobs_.load(std::memory_order_relaxed) + 1;
    if (number == 0) number = 1;
    open_.store(number);
    jobs_.store(number, std::memory_order_release);
    jobs_.notify_all();
    Worker worker(*this, 0, first_phase_);
    job(worker);
    // Sequentially consistent on both sides: a worker enters before it looks whether the job is open, so either it
    // is seen here, or it sees that the job is closed.
    open_.store(0);
    for (uint32_t inside; (inside = inside_.load()) != 0;) inside_.wait(inside);
}

void pl_pool::run_if_open(int thread, uint32_t job) {
    inside_.fetch_add(1);
    if (open_.load() == job) {
        Worker worker(*this, thread, first_phase_);
        (*job_)(worker);
    }
    if (inside_.fetch_sub(1) == 1) inside_.notify_all();
}

void pl_pool::serve(int thread) {
    uint32_t seen = 0, now = 0;
    for (;;) {
        for (int i = 0; i < kIdleSpins && (now = jobs_.load(std::memory_order_acquire)) == seen; i++) relax();
        while ((now = jobs_.load(std::memory_order_acquire)) == seen) jobs_.wait(seen, std::memory_order_acquire);
        seen = now;
        if (stopping_) return;
        run_if_open(thread, seen);
    }
}
