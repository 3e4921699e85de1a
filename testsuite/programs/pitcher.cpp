// Threads that throw exceptions from a function, through a second, to a third, all of which are patched: in the program, and in a library made from the same source
// (-DLIBRARY). Each line of input is answered by one, as in pair.c: calls, results that were wrong, the version now, and whether backtraces are as deep as they were.
// The letter c in a line has the library closed first.

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <execinfo.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include "check.h"

#ifndef VERSION
#define VERSION 1
#endif

#ifdef LIBRARY
#define NAME(name) library_##name
#else
#define NAME(name) name
#endif

namespace {

thread_local unsigned long left;

struct Ball {
	int speed, version;
};

struct Guard {
	~Guard() { left++; }
};

}  // namespace

extern "C" {

TRACED void NAME(pitch)(int speed) { throw Ball{speed, VERSION}; }

TRACED int NAME(between)(int speed)
{
	Guard guard;

	NAME(pitch)(speed);
	return OPAQUE(VERSION);
}

// What was thrown, who threw it, and who caught it.
TRACED int NAME(attempt)(int speed)
{
	unsigned long before = left;

	try {
		return NAME(between)(speed) - 1000000;
	} catch (const Ball &ball) {
		if (left != before + 1)
			return -1;
		return ball.speed * 100 + ball.version * 10 + VERSION;
	}
}

TRACED int NAME(depth)(int extra)
{
	void *frames[64];
	int found = backtrace(frames, 64);

	return found + extra * OPAQUE(VERSION);
}

}

#ifndef LIBRARY

static std::atomic<unsigned long> calls, wrong;
static std::atomic<int (*)(int)> other_attempt;
static std::atomic<int> users, begun;

static bool is_of_one_version(int answer, int speed)
{
	int versions = answer - speed * 100;

	return versions == 11 || versions == 22 || versions == 33;
}

static void *throw_for_ever(void *unused)
{
	bool is_first = true;

	for (int speed = 0;; speed = (speed + 1) & 0xfff) {
		if (!is_of_one_version(attempt(speed), speed))
			wrong++;
		users++;
		if (auto other = other_attempt.load(); other && !is_of_one_version(other(speed), speed))
			wrong++;
		users--;
		calls++;
		// What the C library has for a thread comes with its first exception.
		if (is_first) {
			is_first = false;
			begun++;
		}
		// Elsewhere, most of the time.
		for (volatile int i = 0; i < 20000; i = i + 1)
			;
	}
	return unused;
}

int main(int argc, char **argv)
{
	void *library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : nullptr;

	// Whatever becomes of the check, this ends.
	alarm(300);
	if (library)
		other_attempt = reinterpret_cast<int (*)(int)>(dlsym(library, "library_attempt"));
	int deep = depth(0);
	for (int i = 0; i < 4; i++) {
		pthread_t thread;
		pthread_create(&thread, nullptr, throw_for_ever, nullptr);
	}
	while (begun < 4)
		sched_yield();
	puts("ready");
	fflush(stdout);
	for (int c; (c = getchar()) != EOF;) {
		if (c == 'c') {
			other_attempt = nullptr;
			while (users)
				sched_yield();
			EXPECT(dlclose(library) == 0);
		}
		if (c != '\n')
			continue;
		unsigned long before = calls;
		while (calls < before + 200)
			sched_yield();
		auto other = other_attempt.load();
		int version = attempt(0) / 10 * 10 + (other ? other(0) / 10 : 0);
		printf("%lu %lu %d %d\n", calls.load(), wrong.load(), version, depth(0) == deep);
		fflush(stdout);
	}
	return 0;
}

#endif
