/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * What a tun device hashes by itself, as the kernels keep it that can do that (the series "tun:
 * Introduce virtio-net hashing feature").  No ioctl tells it; the members carry these names.
 */
#ifndef QS_TUN_VNET_H
#define QS_TUN_VNET_H

#include "tun.h"

#define QS_VNET_HASH_REPORT 0x0001
#define QS_VNET_HASH_RSS 0x0002

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct tun_struct___vnet {
	void *vnet_hash;
};

/* v3 to v11; struct tun_vnet_hash is what user space passes there. */
struct tun_vnet_hash___v3 {
	__u16 flags;
	__u32 types;
};

struct tun_vnet_hash_rss {
	__u16 indirection_table_mask;
	__u16 unclassified_queue;
};

struct tun_vnet_hash_container {
	struct tun_vnet_hash___v3 common;
	struct tun_vnet_hash_rss rss;
	__u32 rss_key[1];
	__u16 rss_indirection_table[];
};

/* v12 */
struct tun_vnet_rss {
	__u32 hash_types;
	__u16 indirection_table_mask;
	__u16 unclassified_queue;
};

struct tun_vnet_hash___v12 {
	bool report;
	bool rss;
	struct tun_vnet_rss common;
	__u32 rss_key[1];
	__u16 rss_indirection_table[];
};

#pragma clang attribute pop

/* Whether this kernel can, and tells where it keeps it. */
static __always_inline bool qs_tells_vnet_hash(void)
{
	return bpf_core_field_exists(struct tun_struct___vnet, vnet_hash) &&
	       (bpf_core_type_exists(struct tun_vnet_hash_container) ||
		bpf_core_field_exists(struct tun_vnet_hash___v12, common));
}

/* Where its key and table are, and all else; false where there is nothing, or nobody knows how. */
static __always_inline bool qs_vnet_hash_of(struct tun_struct *tun, struct qs_vnet_hash *found,
					    const void **key, const void **table)
{
	struct tun_struct___vnet *with = (void *)tun;
	void *at;

	if (!qs_tells_vnet_hash())
		return false;
	at = BPF_CORE_READ(with, vnet_hash);
	if (!at)
		return false;
	if (bpf_core_type_exists(struct tun_vnet_hash_container)) {
		struct tun_vnet_hash_container *hash = at;
		__u16 flags = BPF_CORE_READ(hash, common.flags);

		found->rss = !!(flags & QS_VNET_HASH_RSS);
		found->report = !!(flags & QS_VNET_HASH_REPORT);
		found->types = BPF_CORE_READ(hash, common.types);
		found->entries = BPF_CORE_READ(hash, rss.indirection_table_mask) + 1;
		found->unclassified_queue = BPF_CORE_READ(hash, rss.unclassified_queue);
		*key = hash->rss_key;
		*table = hash->rss_indirection_table;
	} else {
		struct tun_vnet_hash___v12 *hash = at;

		found->rss = BPF_CORE_READ(hash, rss);
		found->report = BPF_CORE_READ(hash, report);
		found->types = BPF_CORE_READ(hash, common.hash_types);
		found->entries = BPF_CORE_READ(hash, common.indirection_table_mask) + 1;
		found->unclassified_queue = BPF_CORE_READ(hash, common.unclassified_queue);
		*key = hash->rss_key;
		*table = hash->rss_indirection_table;
	}
	if (!found->rss)
		found->entries = found->unclassified_queue = 0;
	return found->rss || found->report;
}

/* All of it in one number, 0 for nothing.  Of a table as long as none of virtio's, the beginning. */
static __always_inline __u64 qs_vnet_hash_digest(struct tun_struct *tun)
{
	struct qs_vnet_hash found = {};
	const void *key, *table;
	__u64 word = 0, hash;

	if (!qs_vnet_hash_of(tun, &found, &key, &table))
		return 0;
	hash = qs_fold(QS_MAGIC, (__u64)found.rss << 33 | (__u64)found.report << 32 | found.types);
	hash = qs_fold(hash, (__u64)found.entries << 16 | found.unclassified_queue);
	for (__u32 i = 0; i < QS_KEY_BYTES / 8 && found.rss; i++) {
		bpf_probe_read_kernel(&word, sizeof(word), key + 8 * i);
		hash = qs_fold(hash, word);
	}
	for (__u32 i = 0; i < QS_TABLE_ENTRIES && i < found.entries; i++) {
		__u16 entry = 0;

		bpf_probe_read_kernel(&entry, sizeof(entry), table + 2 * i);
		hash = qs_fold(hash, entry);
	}
	return qs_fold(hash, 1) | 1;
}

#endif
