/* trapline: hook the functions of the own process while its threads run them.
 *
 * Made from the library's source; see docs/library.md for the way to a first result. Functions that can fail return a status, and
 * trapline_message() tells people why. Names that begin with `trapline_` and `TRAPLINE_` belong to the library.
 *
 * SPDX-License-Identifier: MIT OR Apache-2.0
 */

#ifndef TRAPLINE_H
#define TRAPLINE_H

#include <stddef.h>
#include <stdint.h>

/*
 Register without attaching; `trapline_enable` does that.
 */
#define TRAPLINE_DISABLED 1

/*
 The callback sees and may change all registers: `trapline_call_register`.
 */
#define TRAPLINE_SAVE_REGISTERS 2

/*
 The callback may send the call elsewhere: `trapline_call_redirect`. One ops for each function may.
 */
#define TRAPLINE_IP_MODIFY 4

/*
 The callback may be entered while it runs, if it calls traced functions. Without this such calls are left out and counted: `trapline_recursions`.
 */
#define TRAPLINE_RECURSION_SAFE 8

/*
 How a call of the library went.
 */
typedef enum trapline_status {
  /*
   It did what it says.
   */
  TRAPLINE_STATUS_OK = 0,
  /*
   An argument makes no sense: a null pointer, text that is not UTF-8, an index beyond the end.
   */
  TRAPLINE_STATUS_ARGUMENT = 1,
  /*
   The process has a tracer already.
   */
  TRAPLINE_STATUS_ALREADY_RUNNING = 2,
  /*
   No loaded object has a function that can be traced.
   */
  TRAPLINE_STATUS_NO_SITES = 3,
  /*
   No function has the name, or the filter selects none. The message has names that are near.
   */
  TRAPLINE_STATUS_NO_MATCH = 4,
  /*
   More than one function has the name.
   */
  TRAPLINE_STATUS_AMBIGUOUS = 5,
  /*
   Another ops with `TRAPLINE_IP_MODIFY` holds one of the functions.
   */
  TRAPLINE_STATUS_TAKEN = 6,
  /*
   Code is not what it should be: a debugger or another patcher writes there.
   */
  TRAPLINE_STATUS_TEXT = 7,
  /*
   Threads are where they may not be. Trying again may help.
   */
  TRAPLINE_STATUS_BUSY = 8,
  /*
   An earlier change failed and could not be undone. The process goes on; nothing more can be changed.
   */
  TRAPLINE_STATUS_STUCK = 9,
  /*
   The system refused something. The message has what, and what to do.
   */
  TRAPLINE_STATUS_SYSTEM = 10,
  /*
   A defect of trapline's. Please report the message.
   */
  TRAPLINE_STATUS_INTERNAL = 11,
} trapline_status;

/*
 A general register, by the names that it has at both widths.
 */
typedef enum trapline_register {
  /*
   Accumulator.
   */
  TRAPLINE_REGISTER_AX = 0,
  /*
   Base; a register that functions keep.
   */
  TRAPLINE_REGISTER_BX = 1,
  /*
   Count.
   */
  TRAPLINE_REGISTER_CX = 2,
  /*
   Data.
   */
  TRAPLINE_REGISTER_DX = 3,
  /*
   Source.
   */
  TRAPLINE_REGISTER_SI = 4,
  /*
   Destination.
   */
  TRAPLINE_REGISTER_DI = 5,
  /*
   Frame pointer.
   */
  TRAPLINE_REGISTER_BP = 6,
  /*
   Stack pointer, which points to the return address. A change has no effect.
   */
  TRAPLINE_REGISTER_SP = 7,
  /*
   64 bit only, as the following.
   */
  TRAPLINE_REGISTER_R8 = 8,
  /*
   64 bit only.
   */
  TRAPLINE_REGISTER_R9 = 9,
  /*
   64 bit only.
   */
  TRAPLINE_REGISTER_R10 = 10,
  /*
   64 bit only.
   */
  TRAPLINE_REGISTER_R11 = 11,
  /*
   64 bit only.
   */
  TRAPLINE_REGISTER_R12 = 12,
  /*
   64 bit only.
   */
  TRAPLINE_REGISTER_R13 = 13,
  /*
   64 bit only.
   */
  TRAPLINE_REGISTER_R14 = 14,
  /*
   64 bit only.
   */
  TRAPLINE_REGISTER_R15 = 15,
  /*
   The flags.
   */
  TRAPLINE_REGISTER_FLAGS = 16,
} trapline_register;

/*
 A call of a traced function, before its first instruction. A callback gets it, and may use it until it returns.
 */
typedef struct trapline_call trapline_call;

/*
 Chooses functions. Not for use by two threads at once.
 */
typedef struct trapline_filter trapline_filter;

/*
 A callback that is attached to functions.
 */
typedef struct trapline_ops trapline_ops;

/*
 The tracer of a process: there is one at most.
 */
typedef struct trapline_tracer trapline_tracer;

/*
 A function of any signature.
 */
typedef void (*trapline_function)(void);

/*
 A function that can be traced.
 */
typedef struct trapline_site {
  /*
   Where the call is put: at the function's entry, behind `endbr` if it has one.
   */
  const void *address;
  /*
   The function behind the site: a call of it is one that no ops sees. What replaces the function calls the function itself by it, cast to the function's
   own type. It is good as long as the function's object is loaded.
   */
  trapline_function body;
  /*
   The function's name as its source has it. It is good until `trapline_stop`, as the symbol is.
   */
  const char *name;
  /*
   Its symbol as the linker knows it.
   */
  const char *symbol;
} trapline_site;

/*
 A function that was compiled for tracing, and cannot be traced.
 */
typedef struct trapline_skipped {
  /*
   The site, or where what lists it begins.
   */
  const void *address;
  /*
   The function's name, or the file's. It is good until `trapline_stop`, as the reason is.
   */
  const char *name;
  /*
   Why.
   */
  const char *reason;
} trapline_skipped;

/*
 What was done since the process's tracer was made.
 */
typedef struct trapline_statistics {
  /*
   Batches of changes.
   */
  uint64_t batches;
  /*
   Sites that were rewritten by them.
   */
  uint64_t pokes;
  /*
   Breakpoints that threads met meanwhile. None of them lost a call.
   */
  uint64_t traps;
} trapline_statistics;

/*
 Called before the first instruction of a traced function, in the thread that calls it, in the middle of anything: it must not wait for what that thread may
 hold, and must not leave by an exception or a jump. `call` is good until it returns.
 */
typedef void (*trapline_callback)(struct trapline_call *call, void *data);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 What went wrong in the last call of the calling thread that failed, for people: what was being done, what was found, and what to do. An empty text if none
 has failed. It is good until the next call of this thread that fails.
 */
const char *trapline_message(void);

/*
 The version of the library: 0x00010203 is 1.2.3. Versions with the same first number that is not 0 do what the header of an older one says.
 */
uint32_t trapline_version(void);

/*
 Makes the process's tracer: finds the functions of all loaded objects that were compiled for tracing, with `-fpatchable-function-entry=5` for instance,
 and takes SIGTRAP over. `trapline_stop` ends it.

 What has to be so:
 `tracer` is good for a write.
 */
enum trapline_status trapline_start(struct trapline_tracer **tracer);

/*
 Ends the tracer; nothing if it is NULL. Functions that ops are attached to stay traced until these are detached as well: with the last of them the original
 code is back, and SIGTRAP is the program's again.

 What has to be so:
 `tracer` is NULL, or a tracer that has not been stopped.
 */
void trapline_stop(struct trapline_tracer *tracer);

/*
 How many functions can be traced; 0 if `tracer` is NULL.

 What has to be so:
 `tracer` is NULL or a tracer.
 */
uintptr_t trapline_site_count(const struct trapline_tracer *tracer);

/*
 Tells of the function with this index, from 0; they are sorted by address.

 What has to be so:
 `tracer` is a tracer, `site` is good for a write.
 */
enum trapline_status trapline_site_at(const struct trapline_tracer *tracer,
                                      uintptr_t index,
                                      struct trapline_site *site);

/*
 Tells of the function of this name, or of this symbol.

 What has to be so:
 `tracer` is a tracer, `name` text that ends with a zero byte, `site` is good for a write.
 */
enum trapline_status trapline_site_find(const struct trapline_tracer *tracer,
                                        const char *name,
                                        struct trapline_site *site);

/*
 How many functions were compiled for tracing and cannot be traced; 0 if `tracer` is NULL.

 What has to be so:
 `tracer` is NULL or a tracer.
 */
uintptr_t trapline_skipped_count(const struct trapline_tracer *tracer);

/*
 Tells of the skipped function with this index, from 0.

 What has to be so:
 `tracer` is a tracer, `skipped` is good for a write.
 */
enum trapline_status trapline_skipped_at(const struct trapline_tracer *tracer,
                                         uintptr_t index,
                                         struct trapline_skipped *skipped);

/*
 Tells what was done so far.

 What has to be so:
 `tracer` is a tracer, `stats` is good for a write.
 */
enum trapline_status trapline_stats(const struct trapline_tracer *tracer, struct trapline_statistics *stats);

/*
 Waits until no thread can be inside a callback that was detached before: then what its `data` points to may be freed, and the object that it is in may be
 unloaded. `TRAPLINE_STATUS_BUSY` after `timeout_ms` milliseconds.

 What has to be so:
 `tracer` is a tracer.
 */
enum trapline_status trapline_synchronize(const struct trapline_tracer *tracer,
                                          uint32_t timeout_ms);

/*
 Makes a filter that selects nothing yet; `trapline_filter_free` frees it.

 What has to be so:
 `filter` is good for a write.
 */
enum trapline_status trapline_filter_new(struct trapline_filter **filter);

/*
 Selects functions whose names match a glob: `*` any run of characters, `?` any one, `[a-z]` and `[!a-z]` one of a set. Names are as the source has them: of
 C++ with parameters, of Rust with the path.

 What has to be so:
 `filter` is a filter, `glob` text that ends with a zero byte.
 */
enum trapline_status trapline_filter_add(struct trapline_filter *filter,
                                         const char *glob);

/*
 Leaves out functions whose names match a glob, also if they are selected otherwise.

 What has to be so:
 `filter` is a filter, `glob` text that ends with a zero byte.
 */
enum trapline_status trapline_filter_except(struct trapline_filter *filter, const char *glob);

/*
 Selects the function whose site has this address, which `trapline_site` tells.

 What has to be so:
 `filter` is a filter.
 */
enum trapline_status trapline_filter_add_address(struct trapline_filter *filter, const void *address);

/*
 Frees a filter; nothing if it is NULL. Ops that were attached by it keep what they need.

 What has to be so:
 `filter` is NULL, or a filter that has not been freed.
 */
void trapline_filter_free(struct trapline_filter *filter);

/*
 Attaches a callback to every function whose name matches `glob`, or to all if that is NULL: when this returns, every further call in every thread is seen.
 `flags` are `TRAPLINE_...` or 0. `trapline_detach` ends it.

 What has to be so:
 `tracer` is a tracer; `glob` is NULL or text that ends with a zero byte; `callback` may be called with `data` from every thread until
 `trapline_synchronize` has succeeded after the ops was detached; `ops` is good for a write.
 */
enum trapline_status trapline_attach(const struct trapline_tracer *tracer,
                                     const char *glob,
                                     uint32_t flags,
                                     trapline_callback callback,
                                     void *data,
                                     struct trapline_ops **ops);

/*
 Attaches a callback as `trapline_attach` does, to the functions that a filter selects.

 What has to be so:
 As for `trapline_attach`; `filter` is a filter.
 */
enum trapline_status trapline_attach_filter(const struct trapline_tracer *tracer,
                                            const struct trapline_filter *filter,
                                            uint32_t flags,
                                            trapline_callback callback,
                                            void *data,
                                            struct trapline_ops **ops);

/*
 Sends every call of the functions whose names match `glob` to `function`, which has their signature. It may call what it replaces at its `body`: see
 `trapline_site`. Callbacks on the functions see the calls as before. Callers that GCC compiles together with the functions need `-fno-ipa-ra`: otherwise they may
 rely on registers that only the replaced function leaves alone.

 What has to be so:
 `tracer` is a tracer; `glob` is text that ends with a zero byte; `function` has the signature and the calling convention of all of them, and stays loaded as
 long as a thread may be in it; `ops` is good for a write.
 */
enum trapline_status trapline_replace(const struct trapline_tracer *tracer,
                                      const char *glob,
                                      trapline_function function,
                                      struct trapline_ops **ops);

/*
 Attaches an ops again that was disabled: from the return on every call is seen.

 What has to be so:
 `ops` is an ops.
 */
enum trapline_status trapline_enable(const struct trapline_ops *ops);

/*
 Detaches an ops for a while: calls that begin after the return are not seen. A thread may still be inside the callback.

 What has to be so:
 `ops` is an ops.
 */
enum trapline_status trapline_disable(const struct trapline_ops *ops);

/*
 Attaches an ops to other functions. Those that both filters select see no gap.

 What has to be so:
 `ops` is an ops, `filter` a filter.
 */
enum trapline_status trapline_set_filter(const struct trapline_ops *ops, const struct trapline_filter *filter);

/*
 How many calls were left out because the callback ran already: it, or what it calls, calls a traced function. 0 if `ops` is NULL.

 What has to be so:
 `ops` is NULL or an ops.
 */
uintptr_t trapline_recursions(const struct trapline_ops *ops);

/*
 Detaches an ops and frees it; nothing if it is NULL. A thread may still be inside the callback: see `trapline_synchronize`.

 What has to be so:
 `ops` is NULL, or an ops that has not been detached.
 */
void trapline_detach(struct trapline_ops *ops);

/*
 The integer or pointer argument with this index, from 0, by the C convention of the width: 64 bit rdi, rsi, rdx, rcx, r8, r9 and then the stack; 32 bit the
 stack. What it means, and whether there is one, only the function's declaration tells. Arguments in vector registers are not seen.

 What has to be so:
 `call` is the callback's.
 */
uintptr_t trapline_call_argument(struct trapline_call *call,
                                 uint32_t index);

/*
 Replaces an argument: the function sees the new value.

 What has to be so:
 `call` is the callback's; the function has an integer or pointer argument with this index, and works with the value.
 */
void trapline_call_set_argument(struct trapline_call *call, uint32_t index, uintptr_t value);

/*
 The site of the function that is called: see `trapline_site`.

 What has to be so:
 `call` is the callback's.
 */
const void *trapline_call_site(struct trapline_call *call);

/*
 Where the function will return to.

 What has to be so:
 `call` is the callback's.
 */
const void *trapline_call_return_address(struct trapline_call *call);

/*
 Makes the call go to another function instead.

 What has to be so:
 `call` is the callback's, of an ops with `TRAPLINE_IP_MODIFY`; `function` has the signature of the one that is called.
 */
void trapline_call_redirect(struct trapline_call *call, trapline_function function);

/*
 Where a register is kept, to be read and changed; NULL if this width has none with the number. `number` is a `trapline_register`.

 What has to be so:
 `call` is the callback's, of an ops with `TRAPLINE_SAVE_REGISTERS` or `TRAPLINE_IP_MODIFY`; the function and its callers work with changed registers.
 */
uintptr_t *trapline_call_register(struct trapline_call *call,
                                  uint32_t number);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* TRAPLINE_H */
