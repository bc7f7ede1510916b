// SPDX-License-Identifier: BSD-2-Clause
/*
 * The part of the benchmark that Python would be too slow for.  Every function returns 0 or more,
 * or a negative errno.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/socket.h>
#include <linux/bpf.h>
#include <linux/if_packet.h>
#include <bpf/bpf.h>
#include <bpf/libbpf.h>

#define QB_QEMU_MAPS 3

static const char *const qb_qemu_maps[QB_QEMU_MAPS] = {
	"tap_rss_map_configurations",
	"tap_rss_map_toeplitz_key",
	"tap_rss_map_indirection_table",
};

static uint64_t qb_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

/* An fd of the program that says 0 to every packet: what no steering program can be below. */
int qb_floor_load(void)
{
	const struct bpf_insn instructions[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};

	return bpf_prog_load(BPF_PROG_TYPE_SOCKET_FILTER, "qsb_floor", "GPL", instructions, 2,
			     NULL);
}

/* QEMU's program from its object file in memory; fds: program, config, key, table. */
int qb_qemu_load(const void *elf, size_t size, int fds[1 + QB_QEMU_MAPS])
{
	struct bpf_object *object = bpf_object__open_mem(elf, size, NULL);
	struct bpf_program *program;
	int result, i;

	if (!object)
		return -errno;
	program = bpf_object__next_program(object, NULL);
	result = program ? bpf_object__load(object) : -ENOENT;
	if (result)
		goto out;
	fds[0] = dup(bpf_program__fd(program));
	for (i = 0; i < QB_QEMU_MAPS; i++)
		fds[1 + i] = dup(bpf_object__find_map_fd_by_name(object, qb_qemu_maps[i]));
	for (i = 0; i < 1 + QB_QEMU_MAPS; i++)
		if (fds[i] < 0)
			result = -EBADF;
	for (i = 0; result && i < 1 + QB_QEMU_MAPS; i++)
		if (fds[i] >= 0)
			close(fds[i]);
out:
	bpf_object__close(object);
	return result;
}

/*
 * BPF_PROG_TEST_RUN, timed from outside: the kernel's own duration is in whole nanoseconds.  With
 * repeat in the hundred thousands the system call itself adds a hundredth of a nanosecond.
 */
int qb_test_run(int prog, const void *packet, uint32_t size, uint32_t repeat, uint32_t *answer,
		uint64_t *elapsed_ns)
{
	LIBBPF_OPTS(bpf_test_run_opts, options, .data_in = packet, .data_size_in = size,
		    .repeat = repeat);
	uint64_t began = qb_now();
	int result = bpf_prog_test_run_opts(prog, &options);

	*elapsed_ns = qb_now() - began;
	*answer = options.retval;
	return result;
}

#define QB_PROGRAMS 8
#define QB_STATS 4 /* BPF_LOG_STATS */

/* "verification time 1234 usec" in what the verifier said; -ENODATA from a kernel that is silent. */
static int64_t qb_verified_us(const char *log)
{
	const char *const words = "verification time ";
	const char *said = strstr(log, words);

	return said ? strtoll(said + strlen(words), NULL, 10) : -ENODATA;
}

/*
 * Load the programs of an object file in memory, and drop them again: the microseconds that the
 * kernel says it verified them for, and what the system calls and libbpf took in all.
 */
int qb_verification(const void *elf, size_t size, uint64_t *verified_us, uint64_t *loaded_ns)
{
	static char logs[QB_PROGRAMS][4096];
	struct bpf_object *object = bpf_object__open_mem(elf, size, NULL);
	struct bpf_program *program;
	int result = 0, count = 0, i;
	uint64_t began;

	if (!object)
		return -errno;
	memset(logs, 0, sizeof(logs));
	bpf_object__for_each_program(program, object) {
		if (!result && count == QB_PROGRAMS)
			result = -E2BIG;
		if (!result)
			result = bpf_program__set_log_level(program, QB_STATS);
		if (!result)
			result = bpf_program__set_log_buf(program, logs[count], sizeof(logs[0]));
		count++;
	}
	began = qb_now();
	if (!result)
		result = bpf_object__load(object);
	*loaded_ns = qb_now() - began;
	bpf_object__close(object);
	*verified_us = 0;
	for (i = 0; !result && i < count; i++) {
		int64_t took = qb_verified_us(logs[i]);

		if (took < 0)
			result = (int)took;
		else
			*verified_us += took;
	}
	return result;
}

/* Traffic */

/* The calling thread, and the children that it gets, move into a network namespace of their own. */
int qb_private_network(void)
{
	return unshare(CLONE_NEWNET) ? -errno : 0;
}

/*
 * A packet socket that is bound to nothing.  With direct it bypasses the queueing discipline, which
 * is cheapest; but then a packet that the tap drops ends the system call that has many.
 */
int qb_sender_open(int direct)
{
	int sock = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0), buffer = 16 << 20;
	int error = 0;

	if (sock < 0)
		return -errno;
	if (setsockopt(sock, SOL_PACKET, PACKET_QDISC_BYPASS, &direct, sizeof(direct)) ||
	    setsockopt(sock, SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof(buffer)))
		error = -errno;
	if (!error)
		return sock;
	close(sock);
	return error;
}

#define QB_BATCH 64

/* One packet of an order: which one of the packets, and out of which one of the devices. */
struct qb_step {
	uint16_t packet;
	uint16_t device;
};

/*
 * Send total packets in an order that is repeated; packets are of size bytes, one after the other.
 * dropped counts those that the sender was told of; the time is that from the first system call to
 * the last.  All of this takes as little memory as can be: the caches are for what is measured.
 */
int qb_send(int sock, const void *packets, uint32_t size, uint32_t packet_count,
	    const int32_t *devices, uint32_t device_count, const struct qb_step *order,
	    uint32_t length, uint64_t total, uint64_t *dropped, uint64_t *elapsed_ns)
{
	struct sockaddr_ll *addresses = calloc(device_count, sizeof(*addresses));
	struct iovec *pieces = calloc(packet_count, sizeof(*pieces));
	struct mmsghdr messages[QB_BATCH];
	uint64_t began, sent = 0;
	uint32_t at = 0, i;
	int result = addresses && pieces ? 0 : -ENOMEM;

	for (i = 0; !result && i < device_count; i++) {
		addresses[i].sll_family = AF_PACKET;
		addresses[i].sll_ifindex = devices[i];
	}
	for (i = 0; !result && i < packet_count; i++) {
		pieces[i].iov_base = (char *)packets + (size_t)i * size;
		pieces[i].iov_len = size;
	}
	memset(messages, 0, sizeof(messages));
	for (i = 0; i < QB_BATCH; i++) {
		messages[i].msg_hdr.msg_namelen = sizeof(*addresses);
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	*dropped = 0;
	began = qb_now();
	while (!result && sent < total) {
		uint32_t batch = total - sent < QB_BATCH ? total - sent : QB_BATCH;
		int done;

		for (i = 0; i < batch; i++) {
			const struct qb_step *step = &order[(at + i) % length];

			messages[i].msg_hdr.msg_name = &addresses[step->device];
			messages[i].msg_hdr.msg_iov = &pieces[step->packet];
		}
		done = sendmmsg(sock, messages, batch, 0);
		if (done < 0 && errno == ENOBUFS) {
			(*dropped)++;
			done = 1;
		}
		if (done < 0)
			result = -errno;
		sent += done;
		at = (at + done) % length;
	}
	*elapsed_ns = qb_now() - began;
	free(pieces);
	free(addresses);
	return result;
}

#define QB_PAUSE_NS 100000

/*
 * Read queues, which do not block, until told to stop.  Between two sweeps it sleeps instead of
 * polling: to wake it would be work of the sender's.
 */
int qb_drain(const int *queues, int count, const volatile int *stop)
{
	const struct timespec pause = { .tv_nsec = QB_PAUSE_NS };
	char frame[2048];
	int i;

	while (!*stop) {
		for (i = 0; i < count; i++)
			while (!*stop && read(queues[i], frame, sizeof(frame)) > 0)
				;
		nanosleep(&pause, NULL);
	}
	return 0;
}
