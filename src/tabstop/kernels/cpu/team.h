// Threads that work through a list of phases together. A phase ends when its items are done, not when all threads have
// come by: who is late, because the system runs something else in its place, holds up nobody as long as it holds no item.
// So the caller alone gets everything done, and other threads only help.
//
// A thread that waits spins for a while and then sleeps: on a full machine its core is then free for the one it waits for.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "machine.h"
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tabstop {

constexpr int SPINS_IN_STEP = 2000, SPINS_BETWEEN = 2000, YIELDS_BETWEEN = 4000;

inline void sleep_while(std::atomic<int32_t>& word, int32_t value) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
    if (word.load() == value) std::this_thread::yield();
#endif
}

inline void wake_all(std::atomic<int32_t>& word) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

struct alignas(64) Phase {
    std::atomic<int32_t> next{0};
    int32_t count = 0, grain = 1;
    alignas(64) std::atomic<int32_t> done{0};
};

// What all threads see of one call. `execute(phase, item)` may be gone as soon as the last item is done.
struct Job {
    std::unique_ptr<Phase[]> phases;
    int32_t num_phases;
    std::function<void(int32_t, int32_t)> execute;
    std::function<void(int32_t)> ended;  // on the caller's thread, behind each phase; may be empty
    std::atomic<int32_t> sleepers{0};

    // How many items a thread takes at once: several runs each, so that a slow thread is helped.
    Job(const std::vector<int32_t>& counts, int num_threads) : phases(new Phase[counts.size()]), num_phases(int32_t(counts.size())) {
        for (int32_t i = 0; i < num_phases; i++) {
            phases[i].count = counts[i];
            int32_t grain = num_threads == 1 ? counts[i] : counts[i] / (num_threads * 8);
            phases[i].grain = grain < 1 ? 1 : grain;
        }
    }

    void help(bool is_caller) {
        for (int32_t index = 0; index < num_phases; index++) {
            Phase& phase = phases[index];
            while (true) {
                int32_t first = phase.next.load(std::memory_order_relaxed);
                if (first >= phase.count) break;
                first = phase.next.fetch_add(phase.grain);
                if (first >= phase.count) break;
                int32_t last = first + phase.grain < phase.count ? first + phase.grain : phase.count;
                for (int32_t item = first; item < last; item++) execute(index, item);
                if (phase.done.fetch_add(last - first) + last - first == phase.count && sleepers.load()) wake_all(phase.done);
            }
            await(phase);
            if (is_caller && ended) ended(index);
        }
    }

    void await(Phase& phase) {
        for (int spins = 0;; spins++) {
            int32_t done = phase.done.load(std::memory_order_acquire);
            if (done == phase.count) return;
            if (spins < SPINS_IN_STEP) {
                relax();
                continue;
            }
            sleepers.fetch_add(1);
            sleep_while(phase.done, done);
            sleepers.fetch_sub(1);
        }
    }
};

class Team {
  public:
    static Team& shared() {
        static Team* team = new Team;  // never destroyed: its threads never end
        return *team;
    }

    // counts: items of each phase. A second caller at the same time works alone.
    void run(int num_threads, const std::vector<int32_t>& counts, const std::function<void(int32_t, int32_t)>& execute,
             const std::function<void(int32_t)>& ended = {}) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock() || owner_ != process()) num_threads = turn.owns_lock() ? adopt(num_threads) : 1;
        auto job = std::make_shared<Job>(counts, num_threads);
        job->execute = execute, job->ended = ended;
        if (num_threads > 1) announce(job, num_threads);
        job->help(true);
    }

  private:
    static int64_t process() {
#if defined(__linux__)
        return getpid();
#else
        return 1;
#endif
    }

    // Threads do not survive a fork.
    int adopt(int num_threads) {
        owner_ = process(), num_helpers_ = 0;
        return num_threads;
    }

    void announce(const std::shared_ptr<Job>& job, int num_threads) {
        {
            std::lock_guard<std::mutex> guard(job_lock_);
            job_ = job, wanted_ = num_threads - 1;
        }
        try {
            for (; num_helpers_ < num_threads - 1; num_helpers_++) std::thread(&Team::serve, this, num_helpers_).detach();
        } catch (const std::system_error&) {
            // The system gives no more threads; those that are there do the work.
        }
        epoch_.fetch_add(1);
        if (sleepers_.load()) wake_all(epoch_);
    }

    void serve(int index) {
        int32_t seen = epoch_.load() - 1;
        while (true) {
            for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen; spins++) {
                if (spins < SPINS_BETWEEN) {
                    relax();
                } else if (spins < SPINS_BETWEEN + YIELDS_BETWEEN) {
                    std::this_thread::yield();
                } else {
                    sleepers_.fetch_add(1);
                    sleep_while(epoch_, seen);
                    sleepers_.fetch_sub(1);
                }
            }
            seen = epoch_.load();
            std::shared_ptr<Job> job;
            {
                std::lock_guard<std::mutex> guard(job_lock_);
                if (index < wanted_) job = job_;
            }
            if (job) job->help(false);
        }
    }

    std::mutex turn_, job_lock_;
    std::shared_ptr<Job> job_;
    int wanted_ = 0, num_helpers_ = 0;
    int64_t owner_ = process();
    alignas(64) std::atomic<int32_t> epoch_{0};
    alignas(64) std::atomic<int32_t> sleepers_{0};
};

}  // namespace tabstop
