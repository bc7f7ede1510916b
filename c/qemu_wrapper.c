// SPDX-License-Identifier: BSD-2-Clause
/*
 * qsteer-qemu: what libvirt runs as a domain's <emulator>, so that QEMU gets a steering program with each NIC.
 *
 * Theory of operation
 *
 * libvirt offers a guest RSS (<driver rss='on'/>), and gives QEMU no program for it; and QEMU itself, an ordinary user,
 * may not load one.  This program is started with QEMU's command line and QEMU's rights.  It asks "qsteer serve" for a
 * program for each NIC of it, writes the fds into the NIC's -device as "ebpf-rss-fds", and becomes QEMU:
 *
 * 1. Find the QEMU in whose place it was called (qemu_find).
 * 2. Find the NICs with RSS (qemu_nics).  There are none when libvirt asks for QEMU's capabilities, and mostly: then
 *    this is an exec and nothing else.
 * 3. Ask QEMU what it can do (qemu_probe), once: fds that it has no use for would keep it from starting.
 * 4. Ask the service (serve_client), NIC by NIC.
 * 5. Become QEMU.
 *
 * The rule is that a VM starts as it would without all this.  Whatever goes wrong is one line in the domain's log, for
 * the one NIC; 2 to 4 have two seconds together; and if not even the changed command line can be run, the one that was
 * given is.  QEMU inherits what this program did: fds, signals, limits, environment.  So signals are not handled but
 * held back, and those that this program itself causes are taken away; what it opens is close-on-exec, but for the fds
 * that are passed on.
 *
 * It has no privilege, and what it does its caller could do, too.  The command line is libvirt's, and is taken for
 * well-meant, but not for well-formed.
 *
 * libvirt remembers a QEMU's capabilities by its <emulator>'s file: an upgrade of QEMU behind this one goes unseen until
 * that is touched, which qsteer's hook does at the first start with the other QEMU (qsteer/hookwork.py).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "auto.h"
#include "deadline.h"
#include "qemu_find.h"
#include "qemu_nics.h"
#include "qemu_probe.h"
#include "refusal.h"
#include "serve_client.h"

#ifndef QS_SOCKET
#define QS_SOCKET "/run/qsteer/serve.sock"
#endif
#define QS_DEADLINE_MS 2000

/* As of a shell. */
enum {
	QS_CANNOT_RUN = 126,
	QS_NOT_FOUND = 127
};

/* Nobody may read the domain's log any more: neither SIGPIPE nor a full pipe stops a VM. */
static void qs_say(struct qs_refusal *line)
{
	struct pollfd log = { .fd = STDERR_FILENO, .events = POLLOUT };

	if (poll(&log, 1, 0) > 0)
		qs_refusal_print(STDERR_FILENO, "qsteer-qemu", line);
}

/* One that is closed would become the next fd that is opened, and lines for people go there. */
static int qs_open_streams(void)
{
	for (int fd = 0; fd <= 2; fd++)
		if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR | O_CLOEXEC) != fd)
			return -1;
	return 0;
}

/* What QEMU is to have of signals, and which of them this program may cause. */
struct qs_signals {
	sigset_t mask, own;
};

/* A signal that waits already has been sent by somebody else, and QEMU gets it. */
static void qs_hold_signals(struct qs_signals *signals)
{
	sigset_t waiting;

	sigemptyset(&signals->own);
	sigpending(&waiting);
	if (!sigismember(&waiting, SIGPIPE))
		sigaddset(&signals->own, SIGPIPE);
	if (!sigismember(&waiting, SIGCHLD))
		sigaddset(&signals->own, SIGCHLD);
	sigprocmask(SIG_BLOCK, &signals->own, &signals->mask);
}

/* Those that wait would outlive an exec. */
static void qs_release_signals(const struct qs_signals *signals)
{
	const struct timespec now = { 0 };

	while (sigtimedwait(&signals->own, NULL, &now) > 0)
		;
	sigprocmask(SIG_SETMASK, &signals->mask, NULL);
}

/* What is known of one start; QEMU is asked when the first NIC needs it. */
struct qs_start {
	char path[PATH_MAX];
	struct qs_signals signals;
	long long deadline;
	bool asked, answered;
	struct qs_qemu qemu;
	struct qs_refusal why_not;
};

static int qs_ask_qemu(struct qs_start *start, struct qs_refusal *refusal)
{
	if (!start->asked) {
		start->asked = true;
		start->answered = !qs_qemu_probe(start->path, &start->signals.mask, start->deadline,
						 &start->qemu, &start->why_not);
	}
	if (start->answered)
		return 0;
	return qs_refuse(refusal, "what %s can do is unknown: %s", start->path, start->why_not.why);
}

/* Whether QEMU has a use for a program: from 9.2 on it ends where it is given fds and has none. */
static int qs_check_qemu(const struct qs_qemu *qemu, bool vhost, struct qs_refusal *refusal)
{
	int version = qemu->major * 100 + qemu->minor;

	if (version < 900)
		return qs_refuse(refusal, "QEMU %d.%d takes none, 9.0 and later do", qemu->major,
				 qemu->minor);
	if (!qemu->ebpf)
		return qs_refuse(refusal, "this QEMU was built without eBPF");
	if (vhost && version > 1000)
		return qs_refuse(refusal, "vhost=on, and QEMU 10.1 and later use none there; "
					  "qsteer keep can steer it");
	return 0;
}

static void qs_pass_on(const struct qs_program *program, bool pass)
{
	for (int i = 0; i < QS_PROGRAM_FDS; i++)
		fcntl(program->fds[i], F_SETFD, pass ? 0 : FD_CLOEXEC);
}

/* A program for a NIC, and its -device as it is with that one. */
static int qs_steer(struct qs_nic *nic, char **device, struct qs_start *start,
		    struct qs_refusal *refusal)
{
	char *changed;

	if (nic->why_not)
		return qs_refuse(refusal, "%s", nic->why_not);
	if (qs_ask_qemu(start, refusal) || qs_check_qemu(&start->qemu, nic->vhost, refusal) ||
	    qs_serve_program(QS_SOCKET, nic->queue_fd, start->deadline, &nic->program, refusal))
		return -1;
	changed = qs_nic_with_fds(*device, nic->program.fds);
	if (!changed)
		return qs_refuse(refusal, "out of memory");
	nic->given = *device;
	*device = changed;
	qs_pass_on(&nic->program, true);
	return 0;
}

/* Become QEMU with a program for each NIC that gets one.  Returns where nothing came of it, and all is as it was. */
static void qs_run_steered(char **argv, struct qs_nics *nics, struct qs_start *start)
{
	struct qs_refusal line, why;
	bool steered = false;

	for (int i = 0; i < nics->count; i++) {
		struct qs_nic *nic = &nics->nic[i];

		if (qs_steer(nic, &argv[nic->position], start, &why))
			qs_refuse(&line, "%s: no program: %s", nic->name, why.why);
		else
			qs_refuse(&line, "%s: program %s", nic->name, nic->program.name);
		qs_say(&line);
		steered |= nic->given != NULL;
	}
	if (!steered)
		return;
	qs_release_signals(&start->signals);
	execv(start->path, argv);
	qs_hold_signals(&start->signals);
	qs_refuse(&line, "%s does not start with programs: %s", start->path, strerror(errno));
	qs_say(&line);
	for (int i = 0; i < nics->count; i++) {
		struct qs_nic *nic = &nics->nic[i];

		if (!nic->given)
			continue;
		argv[nic->position] = nic->given;
		qs_pass_on(&nic->program, false);
	}
}

int main(int argc, char **argv)
{
	static struct qs_start start;
	static struct qs_nics nics;
	struct qs_refusal line, remark;
	bool ready;
	int missing;

	if (argc < 1)
		return QS_NOT_FOUND;
	start.deadline = qs_now_ms() + QS_DEADLINE_MS;
	qs_hold_signals(&start.signals);
	ready = !qs_open_streams();
	missing = qs_qemu_find(argv[0], start.path, &remark, &line);
	if (*remark.why)
		qs_say(&remark);
	if (missing) {
		qs_say(&line);
		return QS_NOT_FOUND;
	}
	argv[0] = start.path;
	qs_nics_read(argc, argv, &nics);
	if (ready && nics.count)
		qs_run_steered(argv, &nics, &start);
	qs_release_signals(&start.signals);
	execv(start.path, argv);
	qs_hold_signals(&start.signals);
	qs_refuse(&line, "cannot run %s: %s", start.path, strerror(errno));
	qs_say(&line);
	return QS_CANNOT_RUN;
}
