// SPDX-License-Identifier: BSD-2-Clause
#include "stub.h"

#include <bpf/bpf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <string.h>

#include "auto.h"
#include "bpf/handover.h"
#include "bpf/toeplitz.h"

/* Instructions: Documentation/bpf/standardization/instruction-set.rst */

#define QS_INSN(c, d, s, o, i)                                                      \
	{                                                                           \
		.code = (c), .dst_reg = (d), .src_reg = (s), .off = (o), .imm = (i) \
	}
#define MOV(dst, src) QS_INSN(BPF_ALU64 | BPF_MOV | BPF_X, dst, src, 0, 0)
#define ALU(op, dst, src) QS_INSN(BPF_ALU64 | (op) | BPF_X, dst, src, 0, 0)
#define ALU_IMM(op, dst, imm) QS_INSN(BPF_ALU64 | (op) | BPF_K, dst, 0, 0, imm)
#define LOAD(size, dst, src, off) QS_INSN(BPF_LDX | BPF_MEM | (size), dst, src, off, 0)
#define STORE(size, dst, src, off) QS_INSN(BPF_STX | BPF_MEM | (size), dst, src, off, 0)
#define STORE_IMM(size, dst, imm, off) QS_INSN(BPF_ST | BPF_MEM | (size), dst, 0, off, imm)
#define JUMP_IMM(op, dst, imm, off) QS_INSN(BPF_JMP | (op) | BPF_K, dst, 0, off, imm)
#define CALL(helper) QS_INSN(BPF_JMP | BPF_CALL, 0, 0, 0, helper)
#define EXIT QS_INSN(BPF_JMP | BPF_EXIT, 0, 0, 0, 0)
/* Two instructions each: a map, and an address in the value of a map with one entry. */
#define MAP(dst, fd) \
	QS_INSN(BPF_LD | BPF_DW | BPF_IMM, dst, BPF_PSEUDO_MAP_FD, 0, fd), QS_INSN(0, 0, 0, 0, 0)
#define MAP_VALUE(dst, fd, off)                                               \
	QS_INSN(BPF_LD | BPF_DW | BPF_IMM, dst, BPF_PSEUDO_MAP_VALUE, 0, fd), \
		QS_INSN(0, 0, 0, 0, off)

#define CB(i) ((int)offsetof(struct __sk_buff, cb[i]))
#define HASH ((int)offsetof(struct __sk_buff, hash))

/* In the first 64 bits of struct qs_rss_config as a number; the types are 16 bits up in either case. */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define QS_REDIRECT_SHIFT 0
#define QS_LENGTH_SHIFT 48
#else
#define QS_REDIRECT_SHIFT 56
#define QS_LENGTH_SHIFT 0
#endif

enum {
	R0,
	R1,
	R2,
	R3,
	R4,
	R5,
	R6,
	R7,
	R8,
	R9,
	R10
};

static int qs_load(const struct bpf_insn *instructions, size_t count, int *fd)
{
	static char log[16 * 1024];
	LIBBPF_OPTS(bpf_prog_load_opts, opts);
	int got = bpf_prog_load(BPF_PROG_TYPE_SOCKET_FILTER, "qsteer_tap", "Dual BSD/GPL",
				instructions, count, &opts);

	if (got < 0) {
		int err = got;

		/* Again, to hear why. */
		opts.log_level = 1;
		opts.log_buf = log;
		opts.log_size = sizeof(log);
		log[0] = '\0';
		got = bpf_prog_load(BPF_PROG_TYPE_SOCKET_FILTER, "qsteer_tap", "Dual BSD/GPL",
				    instructions, count, &opts);
		if (got < 0) {
			qs_log_say(log);
			return err;
		}
	}
	*fd = got;
	return 0;
}

static int qs_id(int prog_fd, __u32 *id)
{
	struct bpf_prog_info info = {};
	__u32 len = sizeof(info);
	int err = bpf_obj_get_info_by_fd(prog_fd, &info, &len);

	if (!err)
		*id = info.id;
	return err;
}

static int qs_map_create(const char *name, __u32 size, __u32 entries, __u32 flags, int *fd)
{
	LIBBPF_OPTS(bpf_map_create_opts, opts, .map_flags = flags);
	int got = bpf_map_create(BPF_MAP_TYPE_ARRAY, name, sizeof(__u32), size, entries, &opts);

	if (got < 0)
		return got;
	*fd = got;
	return 0;
}

/* A map that nobody can write to any more, not even root. */
static int qs_map_frozen(const void *value, __u32 size, int *fd)
{
	qs_auto_close int map = -1;
	__u32 zero = 0;
	int err;

	if ((err = qs_map_create("qsteer.rodata", size, 1, BPF_F_RDONLY_PROG, &map)) ||
	    (err = bpf_map_update_elem(map, &zero, value, BPF_ANY)) || (err = bpf_map_freeze(map)))
		return err;
	*fd = qs_take(&map);
	return 0;
}

/* After how many entries a table repeats itself: a power of two, as its length is. */
static __u32 qs_table_period(const __u16 *table, __u32 length)
{
	__u32 period = length;

	while (period > 1 && !memcmp(table, table + period / 2, period / 2 * sizeof(*table)))
		period /= 2;
	return period;
}

static void qs_windows(const __u8 key[QS_KEY_BYTES], __u64 windows[QS_WINDOWS])
{
	__u64 words[QS_WINDOWS + 1] = {};

	for (int i = 0; i < QS_KEY_BYTES; i++)
		words[i / 8] = words[i / 8] << 8 | key[i];
	for (int i = 0; i < QS_WINDOWS; i++)
		windows[i] = QS_WINDOW(i, words[i], words[i + 1]);
}

int qs_stub_load_frozen(const struct qs_ident *ident, const struct qs_rss_config *config,
			const __u8 key[QS_KEY_BYTES], const __u16 *table, int bodies_fd,
			struct qs_program *program)
{
	qs_auto_close int rodata = -1, prog = -1;
	struct qs_frozen frozen = {
		.ident = *ident,
		.layout = QS_FROZEN_LAYOUT,
		.config = *config,
	};
	struct qs_steering *steering = &frozen.steering;
	__u32 length = config->indirections_len, mask, word;
	int err;

	if (length < 1 || length > QS_TABLE_ENTRIES || length & (length - 1))
		return -EINVAL;
	mask = qs_table_period(table, length) - 1;
	for (__u32 i = 0; i < length; i++) {
		if (table[i] > 0xff)
			return -EOPNOTSUPP;
		frozen.table[i] = table[i];
		steering->table[i] = table[i];
	}
	memcpy(frozen.key, key, sizeof(frozen.key));
	qs_windows(key, steering->windows);
	word = QS_WORD(config->hash_types & QS_HASH_ALL, mask, config->default_queue);

	err = qs_map_frozen(&frozen, sizeof(frozen), &rodata);
	if (err)
		return err;
	{
		const int at = offsetof(struct qs_frozen, steering);
		const int table_at = at + offsetof(struct qs_steering, table);
		const struct bpf_insn instructions[] = {
			MOV(R6, R1),
			MAP_VALUE(R2, rodata, at),
			STORE(BPF_DW, R1, R2, CB(0)),
			LOAD(BPF_DW, R3, R2, 0),
			STORE(BPF_DW, R1, R3, CB(2)),
			/* before 6.4 only a register can be stored in the context */
			ALU_IMM(BPF_MOV, R3, (__s32)word),
			STORE(BPF_W, R1, R3, CB(4)),
			MAP(R2, bodies_fd),
			ALU_IMM(BPF_MOV, R3, QS_BODY_TAP),
			CALL(BPF_FUNC_tail_call),
			/* the body is gone */
			ALU_IMM(BPF_MOV, R1, 0),
			STORE(BPF_DW, R6, R1, CB(0)),
			STORE(BPF_DW, R6, R1, CB(2)),
			STORE(BPF_W, R6, R1, CB(4)),
			LOAD(BPF_W, R1, R6, HASH),
			ALU_IMM(BPF_AND, R1, mask),
			MAP_VALUE(R2, rodata, table_at),
			ALU(BPF_ADD, R2, R1),
			LOAD(BPF_B, R0, R2, 0),
			EXIT,
		};

		err = qs_load(instructions, sizeof(instructions) / sizeof(instructions[0]), &prog);
	}
	if (err || (err = qs_id(prog, &program->id)))
		return err;
	program->prog_fd = qs_take(&prog);
	program->config_fd = program->key_fd = program->table_fd = -1;
	return 0;
}

static const struct {
	const char *name;
	__u32 size;
	__u32 entries;
} qs_rss_maps[QS_RSS_MAPS] = {
	[QS_CONFIG] = { QS_MAP_CONFIG, sizeof(struct qs_rss_config), 1 },
	[QS_KEY] = { QS_MAP_KEY, sizeof(struct qs_rss_key), 1 },
	[QS_TABLE] = { QS_MAP_TABLE, sizeof(__u16), QS_TABLE_ENTRIES },
};

int qs_rss_map_check(int which, int fd)
{
	struct bpf_map_info info = {};
	__u32 len = sizeof(info);
	int err = bpf_obj_get_info_by_fd(fd, &info, &len);

	if (err)
		return err;
	/* Before 9.0 QEMU writes into its own maps by system calls, and they are not mmapable. */
	if (info.type != BPF_MAP_TYPE_ARRAY || info.key_size != sizeof(__u32) ||
	    info.value_size != qs_rss_maps[which].size ||
	    info.max_entries != qs_rss_maps[which].entries || info.map_flags & ~BPF_F_MMAPABLE)
		return -EOPNOTSUPP;
	return 0;
}

/* Another fd of a map that is there already. */
static int qs_map_adopt(int which, int other, int *fd)
{
	int err = qs_rss_map_check(which, other);

	if (err)
		return err;
	*fd = fcntl(other, F_DUPFD_CLOEXEC, 3);
	return *fd < 0 ? -errno : 0;
}

int qs_stub_load_maps(const struct qs_ident *ident, const int *map_fds, int bodies_fd,
		      struct qs_program *program)
{
	qs_auto_close int config = -1, key = -1, table = -1, rodata = -1, prog = -1;
	int *const maps[QS_RSS_MAPS] = { &config, &key, &table };
	int err;

	for (int i = 0; i < QS_RSS_MAPS; i++) {
		err = map_fds ? qs_map_adopt(i, map_fds[i], maps[i]) :
				qs_map_create(qs_rss_maps[i].name, qs_rss_maps[i].size,
					      qs_rss_maps[i].entries, BPF_F_MMAPABLE, maps[i]);
		if (err)
			return err;
	}
	err = qs_map_frozen(ident, sizeof(*ident), &rodata);
	if (err)
		return err;
	{
		const struct bpf_insn instructions[] = {
			MOV(R6, R1),
			/* the address of the table's first entry; there always is one */
			STORE_IMM(BPF_W, R10, 0, -4),
			MOV(R2, R10),
			ALU_IMM(BPF_ADD, R2, -4),
			MAP(R1, table),
			CALL(BPF_FUNC_map_lookup_elem),
			JUMP_IMM(BPF_JNE, R0, 0, 1),
			EXIT,
			STORE(BPF_DW, R6, R0, CB(2)),
			MAP_VALUE(R1, key, QS_KEY_IN_MAP),
			STORE(BPF_DW, R6, R1, CB(0)),

			MAP_VALUE(R1, config, 0),
			LOAD(BPF_H, R5, R1, offsetof(struct qs_rss_config, default_queue)),
			/* types, redirect, length: in one piece */
			LOAD(BPF_DW, R2, R1, 0),
			MOV(R4, R2),
			ALU_IMM(BPF_RSH, R4, QS_REDIRECT_SHIFT),
			ALU_IMM(BPF_AND, R4, 0xff),
			MOV(R3, R2),
			ALU_IMM(BPF_RSH, R3, QS_LENGTH_SHIFT),
			ALU_IMM(BPF_AND, R3, 0xffff),
			ALU_IMM(BPF_RSH, R2, 16),
			ALU_IMM(BPF_AND, R2, QS_HASH_ALL),
			/* no types, if they are of no account ... */
			JUMP_IMM(BPF_JNE, R4, 0, 1),
			ALU_IMM(BPF_MOV, R2, 0),
			/* ... or the length is not a power of two from 1 to 128 */
			MOV(R4, R3),
			ALU_IMM(BPF_SUB, R3, 1),
			ALU(BPF_AND, R4, R3),
			MOV(R1, R3),
			ALU_IMM(BPF_RSH, R1, 7),
			ALU(BPF_OR, R4, R1),
			JUMP_IMM(BPF_JEQ, R4, 0, 1),
			ALU_IMM(BPF_MOV, R2, 0),
			ALU_IMM(BPF_AND, R3, QS_TABLE_ENTRIES - 1),
			ALU_IMM(BPF_LSH, R3, QS_WORD_MASK_SHIFT),
			ALU_IMM(BPF_LSH, R2, QS_WORD_TYPES_SHIFT),
			ALU(BPF_OR, R2, R3),
			ALU(BPF_OR, R2, R5),
			STORE(BPF_W, R6, R2, CB(4)),

			MOV(R1, R6),
			MAP(R2, bodies_fd),
			ALU_IMM(BPF_MOV, R3, QS_BODY_TAP),
			CALL(BPF_FUNC_tail_call),

			/* the body is gone */
			LOAD(BPF_W, R7, R6, CB(4)),
			ALU_IMM(BPF_MOV, R1, 0),
			STORE(BPF_DW, R6, R1, CB(0)),
			STORE(BPF_DW, R6, R1, CB(2)),
			STORE(BPF_W, R6, R1, CB(4)),
			MOV(R1, R7),
			ALU_IMM(BPF_RSH, R1, QS_WORD_TYPES_SHIFT),
			JUMP_IMM(BPF_JNE, R1, 0, 3),
			MOV(R0, R7),
			ALU_IMM(BPF_AND, R0, 0xffff),
			EXIT,
			ALU_IMM(BPF_RSH, R7, QS_WORD_MASK_SHIFT),
			LOAD(BPF_W, R1, R6, HASH),
			ALU(BPF_AND, R7, R1),
			ALU_IMM(BPF_AND, R7, QS_TABLE_ENTRIES - 1),
			STORE(BPF_W, R10, R7, -4),
			MOV(R2, R10),
			ALU_IMM(BPF_ADD, R2, -4),
			MAP(R1, table),
			CALL(BPF_FUNC_map_lookup_elem),
			JUMP_IMM(BPF_JNE, R0, 0, 1),
			EXIT,
			LOAD(BPF_H, R0, R0, 0),
			EXIT,
		};

		err = qs_load(instructions, sizeof(instructions) / sizeof(instructions[0]), &prog);
	}
	/* No instruction refers to the identity, but it belongs to the program. */
	if (err || (err = bpf_prog_bind_map(prog, rodata, NULL)) ||
	    (err = qs_id(prog, &program->id)))
		return err;
	program->prog_fd = qs_take(&prog);
	program->config_fd = qs_take(&config);
	program->key_fd = qs_take(&key);
	program->table_fd = qs_take(&table);
	return 0;
}
