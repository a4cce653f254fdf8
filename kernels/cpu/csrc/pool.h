// The thread pool: jobs that every thread runs as one program of phases, with dynamic claims of each phase's items.
// A phase is over when its items are done, not when all threads have come by: a thread that lost its core between two
// claims, or wakes up late, holds nobody up and joins in wherever the others are.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

// Memory worth fetching while there is nothing else to do.
struct Lookahead {
    const uint8_t *at = nullptr, *end = nullptr;
};

// Items [begin, end) of a phase for one thread, and where that thread's next ones will probably begin.
struct Claim {
    int begin, end, next;
};

// Claims shrink as a phase nears its end (guided self-scheduling): few meetings at the counter, a common end.
static inline int claim_size(int left, int threads) { return std::max(1, 3 * left / (4 * threads)); }

struct pl_pool;

// One thread's way through a job. All threads make the same calls in the same order.
class Worker {
public:
    Worker(pl_pool &pool, int thread, uint32_t phase) : pool_(pool), thread_(thread), phase_(phase) {}

    int thread() const { return thread_; }

    // Whether this thread claims from the end of a phase: two threads so read two unbroken streams.
    bool from_back() const { return thread_ % 2; }

    // One phase: body(claim) for claims of whole chunks of [0, total), each on one thread; returns when all are done.
    // Chunks are larger than asked for where there are too many. Which thread runs an item never changes a result.
    // Waiting threads fetch `ahead` into their caches.
    template <typename Body>
    void each(int total, int chunk, const Body &body, Lookahead *ahead = nullptr);

    // The same, one item at a time: body(item).
    template <typename Body>
    void each_item(int total, const Body &body, Lookahead *ahead = nullptr) {
        each(total, 1, [&](const Claim &c) { for (int i = c.begin; i < c.end; i++) body(i); }, ahead);
    }

private:
    pl_pool &pool_;
    const int thread_;
    uint32_t phase_;
};

struct pl_pool {
public:
    explicit pl_pool(int threads);
    ~pl_pool();
    pl_pool(const pl_pool &) = delete;

    int threads() const { return threads_; }

    // Runs job(worker) on every thread, the caller being thread 0; returns when all items are done and nobody uses
    // `job` any more.
    void run(const std::function<void(Worker &)> &job);

private:
    friend class Worker;

    void serve(int thread);
    void run_if_open(int thread, uint32_t job);
    void wait_for_end_of(uint32_t phase, Lookahead *ahead);

    // Takes some of the phase's chunks; false when none are left, or when the phase is over.
    bool claim(uint32_t phase, int chunks, bool from_back, Claim &claimed) {
        uint64_t word = claims_.load(std::memory_order_relaxed);
        for (;;) {
            const int front = (word >> 16) & 0xffff, back = word & 0xffff, left = chunks - front - back;
            if ((uint32_t)(word >> 32) != phase || left <= 0) return false;
            const int size = claim_size(left, threads_), rest = left - size;
            if (!claims_.compare_exchange_weak(word, word + (from_back ? size : size << 16), std::memory_order_relaxed)) continue;
            const int begin = from_back ? chunks - back - size : front;
            // From the back, the other thread will have claimed once more before.
            const int step = from_back ? -claim_size(rest - claim_size(rest, threads_), threads_) : size;
            claimed = {begin, begin + size, std::clamp(begin + step, 0, chunks - 1)};
            return true;
        }
    }

    void finish(uint32_t phase, int chunks, int size) {
        if (done_.fetch_add(size, std::memory_order_acq_rel) + size < chunks) return;
        done_.store(0, std::memory_order_relaxed);
        claims_.store((uint64_t)(phase + 1) << 32, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        phase_.notify_all();
    }

    const int threads_;
    std::vector<std::thread> workers_;
    const std::function<void(Worker &)> *job_ = nullptr;
    uint32_t first_phase_ = 0;  // of the job
    bool stopping_ = false;
    std::atomic<int> spins_;  // adaptive limit of waits; races only blur it
    alignas(64) std::atomic<uint32_t> jobs_{0};    // bumped when a job starts
    std::atomic<uint32_t> open_{0};                // number of the job that may be entered; 0: none
    alignas(64) std::atomic<uint32_t> inside_{0};  // workers that may use `job_`
    alignas(64) std::atomic<uint32_t> phase_{0};   // the first that is not over
    // On one line, as a thread that is done with a claim asks for the next: the line travels once for both.
    alignas(64) std::atomic<uint64_t> claims_{0};  // phase, chunks claimed from the front, and from the back
    std::atomic<int> done_{0};                     // chunks of this phase
};

template <typename Body>
void Worker::each(int total, int chunk, const Body &body, Lookahead *ahead) {
    if (total <= 0) return;
    // Claims hold 16 bits from either end.
    while (total > chunk * 0xffff) chunk *= 2;
    const int chunks = (total + chunk - 1) / chunk;
    for (Claim c; pool_.claim(phase_, chunks, from_back(), c);) {
        const int size = c.end - c.begin;
        body(Claim{c.begin * chunk, std::min(c.end * chunk, total), c.next * chunk});
        pool_.finish(phase_, chunks, size);
    }
    pool_.wait_for_end_of(phase_, ahead);
    phase_++;
}
