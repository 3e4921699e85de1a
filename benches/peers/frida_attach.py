"""Runs a program with some of its functions under Frida's Interceptor, until it ends.

    frida_attach.py COUNT_FILE|- FUNCTION,FUNCTION... PROGRAM ARGUMENT...

The callbacks are compiled code (a CModule) that does nothing. With a COUNT_FILE they count instead, and the count is written there when the program closes its own
file: that is how it is known that every call is seen.
"""
import sys
import threading

import frida

SECONDS = 120

EMPTY = r"""
#include <gum/guminterceptor.h>
void onEnter(GumInvocationContext *context) {}
void onLeave(GumInvocationContext *context) {}
"""

COUNTING = r"""
#include <gum/guminterceptor.h>
extern volatile int entries;
extern volatile int returns;
void onEnter(GumInvocationContext *context) { entries++; }
void onLeave(GumInvocationContext *context) { returns++; }
"""

SCRIPT = r"""
rpc.exports.attach = (source, wanted, countFile) => {
    const entries = Memory.alloc(4), returns = Memory.alloc(4);
    globalThis.module = new CModule(source, countFile ? { entries, returns } : {});
    const main = Process.mainModule;
    const found = new Map();
    for (const one of [...main.enumerateSymbols(), ...main.enumerateExports()]) {
        if (wanted.includes(one.name) && !one.address.isNull()) found.set(one.name, one.address);
    }
    for (const address of found.values()) Interceptor.attach(address, globalThis.module);
    if (countFile) {
        Interceptor.attach(Module.getGlobalExportByName('fclose'), {
            onEnter() {
                const file = new File(countFile, 'w');
                file.write(`${entries.readU32()} ${returns.readU32()}\n`);
                file.close();
            }
        });
    }
    return found.size;
};
"""


def main() -> int:
    count_file, functions, program, *arguments = sys.argv[1:]
    wanted = functions.split(",")
    device = frida.get_local_device()
    pid = device.spawn([program, *arguments])
    session = device.attach(pid)
    ended = threading.Event()
    session.on("detached", lambda *_: ended.set())
    script = session.create_script(SCRIPT)
    script.load()
    counts = count_file != "-"
    found = script.exports_sync.attach(COUNTING if counts else EMPTY, wanted, count_file if counts else None)
    device.resume(pid)
    if not ended.wait(SECONDS):
        device.kill(pid)
        return 1
    return 0 if found == len(wanted) else 1


sys.exit(main())
