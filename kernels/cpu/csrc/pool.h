// The thread pool: SPMD jobs with a barrier and dynamic work claims. Workers spin briefly, then park.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

struct pl_pool {
public:
    explicit pl_pool(int threads);
    ~pl_pool();
    pl_pool(const pl_pool &) = delete;

    int threads() const { return threads_; }

    // Runs job(thread) on every thread, the caller being thread 0; returns when all are done.
    void run(const std::function<void(int)> &job);

    // Inside a job: waits for all threads. Also makes the next claim() start from 0 again.
    void barrier();

    // Inside a job: takes the next `chunk` of `total` items; false when none are left. Between two barriers all
    // calls must agree on total and chunk. Claims are dynamic, so that a thread that lost its core to another process
    // takes fewer; which thread runs an item never changes a result.
    bool claim(int total, int chunk, int *begin, int *end) {
        int at = next_.fetch_add(chunk, std::memory_order_relaxed);
        if (at >= total) return false;
        *begin = at;
        *end = at + chunk < total ? at + chunk : total;
        return true;
    }

private:
    void work(int thread);
    void wait_at_barrier(uint32_t generation);
    static bool spin(const std::atomic<uint32_t> &word, uint32_t old, int rounds);  // whether it changed
    static void park(std::atomic<uint32_t> &word, uint32_t old);

    const int threads_;
    std::vector<std::thread> workers_;
    const std::function<void(int)> *job_ = nullptr;
    bool stopping_ = false;
    std::atomic<int> spins_;  // adaptive limit at barriers; races only blur it
    alignas(64) std::atomic<uint32_t> jobs_{0};        // bumped when a job starts
    alignas(64) std::atomic<uint32_t> generation_{0};  // bumped when a barrier opens
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> next_{0};
};
