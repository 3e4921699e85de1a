// Runs until SIGTERM, in the way that its first argument says, and checks everything that it does. Makes the folder `ready` when its threads run.
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static std::atomic<bool> is_over{false};
static std::atomic<uint64_t> rounds{0};
static std::atomic<long> begun{0};
static const char *library;

static void fail(const char *what) {
    printf("wrong: %s (errno %d)\n", what, errno);
    fflush(stdout);
    _exit(3);
}

extern "C" __attribute__((noinline)) uint64_t leaf(uint64_t x) { return x * 6364136223846793005ULL + 1442695040888963407ULL; }

extern "C" __attribute__((noinline)) uint64_t deeper(int levels, uint64_t x) {
    if (levels == 0)
        return leaf(x);
    uint64_t result = deeper(levels - 1, x);
    __asm__ volatile("");
    return result + 1;
}

// Whether threads rest between calls: hundreds of them would keep everybody else from running.
static bool is_paced;

static void *calls(void *seed) {
    uint64_t x = reinterpret_cast<uint64_t>(seed);
    while (!is_over) {
        uint64_t expected = x * 6364136223846793005ULL + 1442695040888963407ULL + 20;
        if (deeper(20, x) != expected)
            fail("a result");
        x = expected;
        rounds++;
        if (is_paced)
            usleep(20000);
    }
    return nullptr;
}

__attribute__((noinline)) static int thrower(int levels, int what) {
    std::string kept(static_cast<size_t>(20 + levels), 'x');
    if (levels == 0)
        throw std::runtime_error(std::to_string(what));
    int result = thrower(levels - 1, what);
    return result + static_cast<int>(kept.size());
}

static void *throws(void *seed) {
    int what = static_cast<int>(reinterpret_cast<intptr_t>(seed));
    while (!is_over) {
        try {
            thrower(what % 10, what);
            fail("no exception");
        } catch (const std::runtime_error &error) {
            if (error.what() != std::to_string(what))
                fail("an exception");
        }
        what = (what + 1) % 1000;
        rounds++;
    }
    return nullptr;
}

static void *asks(void *) {
    pid_t own = getpid();
    while (!is_over) {
        for (int i = 0; i < 1000; i++)
            if (syscall(SYS_getpid) != own)
                fail("getpid");
        leaf(1);
        rounds++;
    }
    return nullptr;
}

// Sleeps in a system call for the whole time; none may say that it was interrupted. They are woken at the end through a pipe and a semaphore.
static int wake[2];
static sem_t semaphore;

static void *sleeps(void *number) {
    char byte;
    long kind = reinterpret_cast<long>(number) % 5;
    long result = 0;
    rounds++;
    if (kind == 0)
        result = read(wake[0], &byte, 1) == 1;
    else if (kind == 1) {
        struct pollfd polled = {wake[0], POLLIN, 0};
        result = poll(&polled, 1, -1) == 1;
    } else if (kind == 2) {
        int epoll = epoll_create1(EPOLL_CLOEXEC);
        struct epoll_event event = {};
        event.events = EPOLLIN;
        epoll_ctl(epoll, EPOLL_CTL_ADD, wake[0], &event);
        result = epoll_wait(epoll, &event, 1, -1) == 1;
        close(epoll);
    } else if (kind == 3)
        result = sem_wait(&semaphore) == 0;
    else {
        while (!is_over) {
            struct timespec time = {3600, 0};
            sigset_t set;
            sigemptyset(&set);
            sigaddset(&set, SIGUSR2);
            // Sent to the thread at the end.
            errno = 0;
            if (sigtimedwait(&set, nullptr, &time) == SIGUSR2)
                break;
            fail("sigtimedwait");
        }
        result = 1;
    }
    if (!result)
        fail("a sleep was interrupted");
    return nullptr;
}

static void *loads(void *) {
    while (!is_over) {
        void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
        if (!handle)
            fail(dlerror());
        dlclose(handle);
        rounds++;
    }
    return nullptr;
}

static void *forks(void *) {
    while (!is_over) {
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (child == 0)
            _exit(deeper(5, 7) == leaf(7) + 5 ? 11 : 12);
        int status = 0;
        if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 11)
            fail("a child");
        rounds++;
    }
    return nullptr;
}

struct Work {
    void *(*what)(void *);
    void *with;
};

static void *begin(void *given) {
    Work work = *static_cast<Work *>(given);
    begun++;
    return work.what(work.with);
}

int main(int count, char **words) {
    if (count < 3)
        return 2;
    std::string way = words[1];
    long threads = atol(words[2]);
    is_paced = way == "paced";
    library = count > 3 ? words[3] : nullptr;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &set, nullptr);
    if (pipe(wake) != 0 || sem_init(&semaphore, 0, 0) != 0)
        return 2;
    if (way == "blocked") {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, nullptr);
    }
    std::vector<pthread_t> started(static_cast<size_t>(threads));
    std::vector<Work> works(static_cast<size_t>(threads));
    for (long number = 0; number < threads; number++) {
        auto work = way == "throws" ? throws : way == "asks" ? asks : way == "sleeps" ? sleeps : calls;
        if (way == "changes")
            work = number == 0 ? loads : number == 1 ? forks : calls;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, 256 << 10);
        Work &own = works[static_cast<size_t>(number)];
        own = {work, reinterpret_cast<void *>(number + 1)};
        if (pthread_create(&started[static_cast<size_t>(number)], &attributes, begin, &own) != 0)
            fail("pthread_create");
    }
    while (begun < threads || rounds < static_cast<uint64_t>(threads))
        sched_yield();
    // A folder: it is there at once, without a descriptor that is open for a moment.
    mkdir("ready", 0700);
    int signal = 0;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    while (sigwait(&set, &signal) != 0 || signal != SIGTERM)
        ;
    is_over = true;
    for (long number = 0; number < threads; number++) {
        if (way != "sleeps")
            break;
        if (write(wake[1], "x", 1) != 1)
            fail("write");
        sem_post(&semaphore);
        // Each its own: one that waits for a process is one, however often it was sent.
        pthread_kill(started[static_cast<size_t>(number)], SIGUSR2);
    }
    // Those that only look at the pipe need a byte that stays.
    if (write(wake[1], "xxxx", 4) != 4)
        fail("write");
    for (pthread_t thread : started)
        pthread_join(thread, nullptr);
    printf("right\n");
    return 7;
}
