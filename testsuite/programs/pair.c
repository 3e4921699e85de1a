// Threads that call two functions one after the other, which have to be of the same version. Each line of input is answered by a line: how many calls there were,
// how many pairs were mixed, which version is there now, whether the static variable counts on, and what callbacks of patches have written. The letter f in a line
// has a child of fork say its version first, x one that executes the program anew, t a thread that is started for it.

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#ifndef VERSION
#define VERSION 1
#endif

// What the function that never returns adds.
#ifndef LOOP
#define LOOP 1
#endif

// What the caller of that one adds to its result.
#ifndef SLEEPER
#define SLEEPER 0
#endif

#define THREADS 4

static atomic_ulong calls, mixed;
static atomic_int begun;
static __thread unsigned long own_calls;
static unsigned long counted;
char events[64] = "-";

__attribute__((noipa)) int first(int x)
{
	own_calls++;
	return x * 2 + VERSION;
}

__attribute__((noipa)) int second(int x)
{
	__atomic_fetch_add(&counted, 1, __ATOMIC_RELAXED);
	return x * 3 + VERSION + (own_calls == 0);
}

__attribute__((noipa)) int pair(int x)
{
	int one = first(x);

	// Between the two, so that a transition finds somebody here.
	for (volatile int i = 0; i < 100; i++)
		;
	return one - x * 2 == second(x) - x * 3;
}

__attribute__((noipa)) void for_ever(void)
{
	for (;;) {
		own_calls += LOOP;
		pause();
	}
}

#ifdef CALLBACKS

// What the patch says about itself, in letters.
static int happened(char what)
{
	events[strlen(events)] = what;
	return 0;
}

int trapline_pre_apply(void)
{
#if CALLBACKS == 2
	return happened('a') + 7;
#elif CALLBACKS == 3
	*(volatile int *)OPAQUE(16L) = 1;
#elif CALLBACKS == 4
	for (;;)
		pause();
#endif
	return happened('a');
}

int trapline_post_apply(void)
{
	return happened('A');
}

int trapline_pre_revert(void)
{
	return happened('r') + (CALLBACKS == 5 ? 8 : 0);
}

int trapline_post_revert(void)
{
	return happened('R');
}

#endif

static void *check(void *unused)
{
	atomic_fetch_add(&begun, 1);
	for (int x = 0;; x = (x + 1) & 0xffff) {
		if (!pair(x))
			atomic_fetch_add(&mixed, 1);
		atomic_fetch_add(&calls, 1);
		// Elsewhere, most of the time.
		for (volatile int i = 0; i < 2000; i++)
			;
	}
	return unused;
}

static void *sleeper(void *unused)
{
	atomic_fetch_add(&begun, 1);
	for_ever();
	return (char *)unused + SLEEPER;
}

static void *say_version(void *to)
{
	*(int *)to = first(0);
	return NULL;
}

// The version of a child, or of a new thread.
static int version_of(int which)
{
	pthread_t thread;
	int version = 0;
	int status;

	if (which == 't') {
		pthread_create(&thread, NULL, say_version, &version);
		pthread_join(thread, NULL);
		return version;
	}
	pid_t child = fork();
	if (child == 0) {
		if (which == 'x')
			execl("/proc/self/exe", "pair", "version", NULL);
		_exit(first(0));
	}
	waitpid(child, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

int main(int argc, char **argv)
{
	pthread_t thread;
	int threads = argc > 1 ? atoi(argv[1]) : THREADS;
	int asked = 0;

	if (argc > 1 && strcmp(argv[1], "version") == 0)
		return first(0);
	// Whatever becomes of the check, this ends.
	alarm(argc > 2 ? atoi(argv[2]) : 300);
	for (int i = 0; i < threads; i++)
		pthread_create(&thread, NULL, check, NULL);
	pthread_create(&thread, NULL, sleeper, NULL);
	// Threads that have not begun block all signals.
	while (atomic_load(&begun) < threads + 1)
		sched_yield();
	puts("ready");
	fflush(stdout);
	for (int c; (c = getchar()) != EOF;) {
		if (c != '\n') {
			asked = c;
			continue;
		}
		unsigned long before = atomic_load(&calls);

		while (atomic_load(&calls) < before + 1000)
			sched_yield();
		printf("%lu %lu %d %d %s\n", atomic_load(&calls), atomic_load(&mixed), asked ? version_of(asked) : first(0),
		       __atomic_load_n(&counted, __ATOMIC_RELAXED) >= before, events);
		asked = 0;
		fflush(stdout);
	}
	return 0;
}
