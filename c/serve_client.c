// SPDX-License-Identifier: BSD-2-Clause
/*
 * The protocol is in qsteer/wire.py.  The service is believed, but it may be slow, at its end, or of another version:
 * every wait has the deadline, and every length a bound.
 */
#define _GNU_SOURCE
#include "serve_client.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "auto.h"
#include "deadline.h"
#include "json.h"
#include "send_fd.h"

static const char request[] = "{\"version\":1,\"request\":\"program\"}";
#define QS_REQUEST_LENGTH (sizeof(request) - 1)

/* Room for so many fds and not one more: the kernel drops those, and says so. */
union qs_fds {
	struct cmsghdr header;
	char bytes[CMSG_SPACE(QS_PROGRAM_FDS * sizeof(int))];
};

static int qs_hung_up(struct qs_refusal *refusal)
{
	return qs_refuse(refusal, "qsteer serve has ended the connection");
}

static int qs_failed(const char *what, struct qs_refusal *refusal)
{
	if (errno == ETIMEDOUT || errno == EAGAIN)
		return qs_refuse(refusal, "qsteer serve does not answer in time");
	if (errno == ECONNRESET)
		return qs_hung_up(refusal);
	return qs_refuse(refusal, "%s: %s", what, strerror(errno));
}

static int qs_bad_answer(struct qs_refusal *refusal)
{
	return qs_refuse(refusal,
			 "what qsteer serve answered is not an answer of this version's protocol");
}

static int qs_connect(const char *path, long long deadline, struct qs_refusal *refusal)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	/* Not 0, which is for ever. */
	int wait_ms = qs_left_ms(deadline) + 1;
	struct timeval wait = { .tv_sec = wait_ms / 1000, .tv_usec = wait_ms % 1000 * 1000 };
	qs_auto_close int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	/* connect() waits as long for a place in the queue as send() does for one in a buffer. */
	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait)))
		return qs_failed("cannot make a socket", refusal);
	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	if (!connect(fd, (struct sockaddr *)&address, sizeof(address)))
		return qs_take(&fd);
	if (errno == ENOENT || errno == ECONNREFUSED)
		return qs_refuse(refusal, "no qsteer serve listens at %s", path);
	return qs_failed("cannot reach qsteer serve", refusal);
}

/* A service that has hung up by now has said why before: that is read next. */
static int qs_sent(ssize_t result, struct qs_refusal *refusal)
{
	if (result >= 0 || errno == EPIPE || errno == ECONNRESET)
		return 0;
	return qs_failed("cannot send the tap to qsteer serve", refusal);
}

static int qs_send_request(int socket, int queue_fd, struct qs_refusal *refusal)
{
	uint32_t length = htonl(QS_REQUEST_LENGTH);
	char frame[sizeof(length) + QS_REQUEST_LENGTH];

	memcpy(frame, &length, sizeof(length));
	memcpy(frame + sizeof(length), request, QS_REQUEST_LENGTH);
	if (qs_sent(send(socket, frame, sizeof(frame), MSG_NOSIGNAL), refusal))
		return -1;
	return qs_sent(qs_send_fd(socket, queue_fd, 0), refusal);
}

static int qs_receive(int socket, char *bytes, size_t length, long long deadline,
		      struct qs_refusal *refusal)
{
	while (length) {
		ssize_t got = qs_wait_readable(socket, deadline) ?
				      -1 :
				      recv(socket, bytes, length, MSG_DONTWAIT);

		if (!got)
			return qs_hung_up(refusal);
		if (got < 0)
			return qs_failed("cannot read what qsteer serve answers", refusal);
		bytes += got;
		length -= got;
	}
	return 0;
}

/* The frame; the program's name, or the reason of a refusal. */
static int qs_receive_answer(int socket, long long deadline, struct qs_program *program,
			     struct qs_refusal *refusal)
{
	static char text[QS_JSON_MAX];
	qs_auto_json struct json_object *answer = NULL;
	struct json_object *version;
	const char *name, *error;
	uint32_t length;

	if (qs_receive(socket, (char *)&length, sizeof(length), deadline, refusal))
		return -1;
	length = ntohl(length);
	if (length > sizeof(text))
		return qs_bad_answer(refusal);
	if (qs_receive(socket, text, length, deadline, refusal))
		return -1;
	answer = qs_json_object(text, length);
	if (!answer || !json_object_object_get_ex(answer, "version", &version) ||
	    json_object_get_int(version) != 1)
		return qs_bad_answer(refusal);
	name = qs_json_string(answer, "program");
	error = qs_json_string(answer, "error");
	if (qs_json_true(answer, "ok") && name) {
		strncpy(program->name, name, sizeof(program->name) - 1);
		program->name[sizeof(program->name) - 1] = '\0';
		return 0;
	}
	return error ? qs_refuse(refusal, "%s", error) : qs_bad_answer(refusal);
}

static int qs_receive_fds(int socket, long long deadline, int fds[QS_PROGRAM_FDS],
			  struct qs_refusal *refusal)
{
	char byte;
	struct iovec text = { .iov_base = &byte, .iov_len = 1 };
	union qs_fds control;
	struct msghdr message = {
		.msg_iov = &text,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control.bytes),
	};
	struct cmsghdr *header;
	size_t count = 0;
	ssize_t got = qs_wait_readable(socket, deadline) ?
			      -1 :
			      recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	if (!got)
		return qs_hung_up(refusal);
	if (got < 0)
		return qs_failed("cannot read what qsteer serve gives", refusal);
	header = CMSG_FIRSTHDR(&message);
	if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
		count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(fds, CMSG_DATA(header), count * sizeof(int));
	}
	if (count == QS_PROGRAM_FDS && !(message.msg_flags & MSG_CTRUNC))
		return 0;
	while (count)
		close(fds[--count]);
	if (message.msg_flags & MSG_CTRUNC)
		return qs_refuse(refusal, "qsteer serve gives more fds than there is room for");
	return qs_bad_answer(refusal);
}

/* What an fd is, by the kernel's name for it: "bpf-prog", "bpf-map". */
static bool qs_is_bpf(int fd, const char *what)
{
	char link[32], wanted[32], name[32];
	ssize_t length;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	snprintf(wanted, sizeof(wanted), "anon_inode:%s", what);
	length = readlink(link, name, sizeof(name) - 1);
	if (length < 0)
		return false;
	name[length] = '\0';
	return !strcmp(name, wanted);
}

/* QEMU maps the three maps, a page of each, and ends where it cannot. */
static int qs_check_fds(const int fds[QS_PROGRAM_FDS], struct qs_refusal *refusal)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	if (!qs_is_bpf(fds[0], "bpf-prog"))
		return qs_refuse(refusal, "what qsteer serve gives is no program");
	for (int i = 1; i < QS_PROGRAM_FDS; i++) {
		void *map = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fds[i], 0);

		if (map == MAP_FAILED)
			return qs_failed("cannot use the maps that qsteer serve gives", refusal);
		munmap(map, page);
		if (!qs_is_bpf(fds[i], "bpf-map"))
			return qs_refuse(refusal, "what qsteer serve gives are no maps");
	}
	return 0;
}

int qs_serve_program(const char *socket_path, int queue_fd, long long deadline,
		     struct qs_program *program, struct qs_refusal *refusal)
{
	qs_auto_close int socket = qs_connect(socket_path, deadline, refusal);

	if (socket < 0 || qs_send_request(socket, queue_fd, refusal) ||
	    qs_receive_answer(socket, deadline, program, refusal) ||
	    qs_receive_fds(socket, deadline, program->fds, refusal))
		return -1;
	if (!qs_check_fds(program->fds, refusal))
		return 0;
	for (int i = 0; i < QS_PROGRAM_FDS; i++)
		close(program->fds[i]);
	return -1;
}
