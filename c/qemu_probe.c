// SPDX-License-Identifier: BSD-2-Clause
/*
 * A QEMU without a machine, as libvirt runs one to learn its capabilities: QMP's greeting has the version, and
 * request-ebpf (9.0 and later) is answered with an object file if it was built with eBPF.  The version alone would not
 * do: a QEMU without eBPF ends where it is given fds.
 */
#define _GNU_SOURCE
#include "qemu_probe.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "auto.h"
#include "deadline.h"
#include "json.h"

/* The object file has 27 kB in base64, in QEMU 10.0. */
#define QS_TOLD_MAX (1 << 20)

static const char question[] =
	"{\"execute\":\"qmp_capabilities\"}"
	"{\"execute\":\"request-ebpf\",\"arguments\":{\"id\":\"rss\"},\"id\":\"ebpf\"}";
static const char quit[] = "{\"execute\":\"quit\"}";

struct qs_pipes {
	int question[2], answer[2];
};

static void qs_close_pipes(struct qs_pipes *pipes)
{
	for (int i = 0; i < 2; i++) {
		qs_close(&pipes->question[i]);
		qs_close(&pipes->answer[i]);
	}
}

#define qs_auto_pipes __attribute__((cleanup(qs_close_pipes)))

/* In the child; does not return. */
static void qs_become_qemu(const char *path, const struct qs_pipes *pipes, const sigset_t *mask)
{
	char *const words[] = { (char *)path, "-machine", "none", "-nodefaults", "-no-user-config",
				"-display",   "none",	  "-S",	  "-qmp",	 "stdio",
				(char *)NULL };
	int nothing = open("/dev/null", O_RDWR | O_CLOEXEC);

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (nothing >= 0 && dup2(pipes->question[0], 0) == 0 && dup2(pipes->answer[1], 1) == 1 &&
	    dup2(nothing, 2) == 2 && !syscall(SYS_close_range, 3, ~0U, 0)) {
		sigprocmask(SIG_SETMASK, mask, NULL);
		execv(path, words);
	}
	_exit(127);
}

static int qs_number(const struct json_object *object, const char *key)
{
	struct json_object *member;

	return json_object_object_get_ex(object, key, &member) ? json_object_get_int(member) : 0;
}

/* Whether this was the answer, the last thing that is wanted. */
static bool qs_understand(const struct json_object *told, struct qs_qemu *qemu)
{
	struct json_object *member;
	const char *id = qs_json_string(told, "id");

	if (json_object_object_get_ex(told, "QMP", &member) &&
	    json_object_object_get_ex(member, "version", &member) &&
	    json_object_object_get_ex(member, "qemu", &member)) {
		qemu->major = qs_number(member, "major");
		qemu->minor = qs_number(member, "minor");
	}
	if (!id || strcmp(id, "ebpf"))
		return false;
	qemu->ebpf = json_object_object_get_ex(told, "return", &member) &&
		     qs_json_string(member, "object");
	return true;
}

/* Objects come one after the other, and a read may end anywhere in one. */
static int qs_listen(int fd, long long deadline, struct json_tokener *reader, struct qs_qemu *qemu,
		     struct qs_refusal *refusal)
{
	char bytes[4096];
	size_t total = 0;

	while (total < QS_TOLD_MAX) {
		ssize_t got = qs_wait_readable(fd, deadline) ? -1 : read(fd, bytes, sizeof(bytes));

		if (!got)
			return qs_refuse(refusal, "it ended without an answer");
		if (got < 0)
			return qs_refuse(refusal, errno == ETIMEDOUT ? "it did not answer in time" :
								       "its answer cannot be read");
		total += got;
		for (ssize_t at = 0; at < got; at += json_tokener_get_parse_end(reader)) {
			qs_auto_json struct json_object *told =
				json_tokener_parse_ex(reader, bytes + at, (int)(got - at));
			enum json_tokener_error error = json_tokener_get_error(reader);

			if (error == json_tokener_continue)
				break;
			if (error != json_tokener_success)
				return qs_refuse(refusal, "it answered something else than JSON");
			if (qs_understand(told, qemu))
				return 0;
		}
	}
	return qs_refuse(refusal, "its answer has no end");
}

static int qs_ask(int fd, long long deadline, struct qs_qemu *qemu, struct qs_refusal *refusal)
{
	struct json_tokener *reader = json_tokener_new_ex(QS_JSON_DEPTH);
	int result;

	if (!reader)
		return qs_refuse(refusal, "out of memory");
	result = qs_listen(fd, deadline, reader, qemu, refusal);
	json_tokener_free(reader);
	return result;
}

/* Where it was a script that runs QEMU as another process, that one reads the "quit". */
static void qs_end(pid_t child, int fd)
{
	kill(child, SIGKILL);
	if (write(fd, quit, sizeof(quit) - 1) < 0)
		errno = 0;
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
}

int qs_qemu_probe(const char *path, const sigset_t *mask, long long deadline, struct qs_qemu *qemu,
		  struct qs_refusal *refusal)
{
	qs_auto_pipes struct qs_pipes pipes = { { -1, -1 }, { -1, -1 } };
	ssize_t length = sizeof(question) - 1;
	pid_t child;
	int result;

	*qemu = (struct qs_qemu){ 0 };
	if (pipe2(pipes.question, O_CLOEXEC) || pipe2(pipes.answer, O_CLOEXEC) ||
	    write(pipes.question[1], question, length) != length)
		return qs_refuse(refusal, "it cannot be asked: %s", strerror(errno));
	child = fork();
	if (child < 0)
		return qs_refuse(refusal, "it cannot be started: %s", strerror(errno));
	if (!child)
		qs_become_qemu(path, &pipes, mask);
	qs_close(&pipes.answer[1]);
	pipes.answer[1] = -1; /* so that the end of the child is that of what it says */
	result = qs_ask(pipes.answer[0], deadline, qemu, refusal);
	qs_end(child, pipes.question[1]);
	return result;
}
