// The threads that share the work of one op.
//
// A run is many short rounds, one or two for each op, of items that any thread may take. OpenMP's barriers cost too
// much for rounds as short as these, so workers spin for the next one and sleep between runs. A thread that the system
// has taken off its core delays a round only if it is in the middle of an item: whoever is there takes the next one,
// and a round is over when all its items are done.

#include <pthread.h>
#include <stdlib.h>

#include <atomic>

#include "threads.h"

namespace dsr {

namespace {

constexpr int SPINS = 20000;  // some tens of microseconds: longer than the pause between two ops

// A ticket is the number of a round, its number of items, and the next item, in one word of 64 bits: a worker that
// comes late cannot take an item of one round for one of another.
constexpr int BITS = 20;
constexpr int64_t MOST_ITEMS = (int64_t(1) << BITS) - 4096;  // each thread may count once past the end
constexpr uint64_t FIELD = (uint64_t(1) << BITS) - 1;

inline uint64_t next_of(uint64_t ticket) { return ticket & FIELD; }
inline uint64_t count_of(uint64_t ticket) { return ticket >> BITS & FIELD; }
inline bool open(uint64_t ticket) { return next_of(ticket) < count_of(ticket); }

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

namespace {

struct Worker {
    pthread_t thread;
    Pool* pool;
    int number;  // from 1 on: the caller of a round is thread 0
};

}  // namespace

struct Pool {
    int workers;
    Worker* threads;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    std::atomic<uint64_t> ticket;
    std::atomic<int64_t> done;
    std::atomic<int> sleeping;
    std::atomic<bool> stop;
    // The round that is going on; written only while no thread has an item.
    uint64_t round;
    int64_t first;
    void (*f)(const void*, int64_t, int);
    const void* context;
};

namespace {

void work(Pool* pool, int thread) {
    // Looked at before it is counted up: workers without work must not count the ticket into the next field.
    while (open(pool->ticket.load(std::memory_order_acquire))) {
        const uint64_t ticket = pool->ticket.fetch_add(1, std::memory_order_acq_rel);
        if (!open(ticket)) return;
        pool->f(pool->context, pool->first + (int64_t)next_of(ticket), thread);
        pool->done.fetch_add(1, std::memory_order_acq_rel);
    }
}

void wait_for_work(Pool* pool) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (open(pool->ticket.load(std::memory_order_acquire)) || pool->stop.load(std::memory_order_acquire)) return;
        pause_briefly();
    }
    pthread_mutex_lock(&pool->lock);
    pool->sleeping.fetch_add(1);
    while (!open(pool->ticket.load()) && !pool->stop.load()) pthread_cond_wait(&pool->wake, &pool->lock);
    pool->sleeping.fetch_sub(1);
    pthread_mutex_unlock(&pool->lock);
}

void* worker(void* argument) {
    const Worker* self = (const Worker*)argument;
    Pool* pool = self->pool;
    while (!pool->stop.load(std::memory_order_acquire)) {
        work(pool, self->number);
        wait_for_work(pool);
    }
    return nullptr;
}

void wake_sleepers(Pool* pool) {
    // A worker counts itself as asleep before its last look at the ticket, and this looks after it has changed.
    if (!pool->sleeping.load()) return;
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

void run_round(Pool* pool, int64_t first, int64_t n, void (*f)(const void*, int64_t, int), const void* context) {
    pool->first = first;
    pool->f = f;
    pool->context = context;
    pool->done.store(0, std::memory_order_relaxed);
    pool->ticket.store(++pool->round << 2 * BITS | (uint64_t)n << BITS);
    wake_sleepers(pool);
    work(pool, 0);
    while (pool->done.load(std::memory_order_acquire) < n) pause_briefly();
}

}  // namespace

int threads_of(const Pool* pool) { return pool ? pool->workers + 1 : 1; }

void parallel(Pool* pool, int64_t n, void (*f)(const void*, int64_t, int), const void* context) {
    if (!pool || n < 2) {
        for (int64_t i = 0; i < n; i++) f(context, i, 0);
        return;
    }
    for (int64_t first = 0; first < n; first += MOST_ITEMS)
        run_round(pool, first, n - first < MOST_ITEMS ? n - first : MOST_ITEMS, f, context);
}

namespace {

struct Anywhere {
    void (*f)(const void*, int64_t);
    const void* context;
};

void run_anywhere(const void* context, int64_t item, int) {
    const Anywhere& anywhere = *(const Anywhere*)context;
    anywhere.f(anywhere.context, item);
}

constexpr int64_t SHARES = 32;  // enough to share evenly, few enough that asking for them costs nothing

struct Shares {
    const Call& call;
    void (*f)(const Call&, int64_t);
    int64_t count, at_once;
};

void run_share(const void* context, int64_t item) {
    const Shares& shares = *(const Shares*)context;
    const int64_t begin = item * shares.at_once, end = begin + shares.at_once;
    for (int64_t i = begin; i < (end < shares.count ? end : shares.count); i++) shares.f(shares.call, i);
}

}  // namespace

void parallel(Pool* pool, int64_t n, void (*f)(const void*, int64_t), const void* context) {
    const Anywhere anywhere{f, context};
    parallel(pool, n, run_anywhere, &anywhere);
}

void in_shares(const Call& call, void (*f)(const Call&, int64_t), int64_t count) {
    const Shares shares{call, f, count, count / SHARES + 1};
    parallel(call.pool, (count + shares.at_once - 1) / shares.at_once, run_share, &shares);
}

Pool* new_pool(int threads) {
    if (threads < 2) return nullptr;
    Pool* pool = (Pool*)calloc(1, sizeof(Pool));
    if (!pool) return nullptr;
    pool->threads = (Worker*)calloc(threads, sizeof(Worker));
    pthread_mutex_init(&pool->lock, nullptr);
    pthread_cond_init(&pool->wake, nullptr);
    for (int i = 0; pool->threads && i < threads - 1; i++) {
        Worker& next = pool->threads[i];
        next.pool = pool;
        next.number = i + 1;
        if (pthread_create(&next.thread, nullptr, worker, &next)) break;
        pool->workers++;
    }
    return pool;
}

void free_pool(Pool* pool) {
    if (!pool) return;
    pthread_mutex_lock(&pool->lock);
    pool->stop.store(true);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->workers; i++) pthread_join(pool->threads[i].thread, nullptr);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool->threads);
    free(pool);
}

}  // namespace dsr
