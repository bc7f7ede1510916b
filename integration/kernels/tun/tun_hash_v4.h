/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Generations 4 to 11: one request that says what there is, and one that sets all.
 *
 * User memory begins with struct tun_vnet_hash.  With TUN_VNET_HASH_RSS in its flags there follow
 * struct tun_vnet_hash_rss, a table of indirection_table_mask + 1 entries, and the beginning of a
 * key.
 */
#ifndef TUN_HASH_V4_H
#define TUN_HASH_V4_H

#define TUN_VNET_HASH_REPORT 0x0001
#define TUN_VNET_HASH_RSS 0x0002

struct tun_vnet_hash {
	u16 flags;
	u8 pad[2];
	u32 types;
};

struct tun_vnet_hash_rss {
	u16 indirection_table_mask;
	u16 unclassified_queue;
};

struct tun_vnet_hash_container {
	struct tun_vnet_hash common;
	struct tun_vnet_hash_rss rss;
	TUN_HASH_KEY_WORD rss_key[TUN_HASH_KEY_ROOM];
	u16 rss_indirection_table[];
};

#define TUNGETVNETHASHCAP _IOR('T', 228, struct tun_vnet_hash)
#define TUNSETVNETHASH _IOW('T', 229, struct tun_vnet_hash)

#define TUN_HASH_STATE struct tun_vnet_hash_container
#define TUN_HASH_MEMBER vnet_hash
#define TUN_HASH_OR_EBPF (TUN_HASH_GENERATION < 11)
#define TUN_HASH_REPORT_TAKES_HEADER (TUN_HASH_GENERATION == 4)
#define TUN_HASH_EBPF_FALLBACK false

static long tun_hash_get(unsigned int cmd, void __user *argp)
{
	static const struct tun_vnet_hash cap = {
		.flags = TUN_VNET_HASH_REPORT | TUN_VNET_HASH_RSS,
		.types = TUN_HASH_TYPES,
	};

	if (cmd != TUNGETVNETHASHCAP)
		return -ENOIOCTLCMD;
	return copy_to_user(argp, &cap, sizeof(cap)) ? -EFAULT : 0;
}

static bool tun_hash_is_set(unsigned int cmd)
{
	return cmd == TUNSETVNETHASH;
}

static TUN_HASH_STATE *tun_hash_copy(unsigned int cmd, const void __user *argp)
{
	struct tun_vnet_hash_rss rss = {};
	struct tun_vnet_hash common;
	TUN_HASH_STATE *state;
	size_t table = 0;

	if (copy_from_user(&common, argp, sizeof(common)))
		return ERR_PTR(-EFAULT);
	argp += sizeof(common);
	if (!common.flags)
		return NULL;

	if (common.flags & TUN_VNET_HASH_RSS) {
		if (copy_from_user(&rss, argp, sizeof(rss)))
			return ERR_PTR(-EFAULT);
		argp += sizeof(rss);
		table = (rss.indirection_table_mask + 1) * sizeof(u16);
	}

	/* Not zeroed: the rest of a key that is not read is whatever was in memory. */
	state = kmalloc(sizeof(*state) + table, GFP_KERNEL | __GFP_NOWARN);
	if (!state)
		return ERR_PTR(-ENOMEM);
	state->common = common;
	state->rss = rss;

	if (common.flags & TUN_VNET_HASH_RSS &&
	    (copy_from_user(state->rss_indirection_table, argp, table) ||
	     tun_hash_copy_key(state->rss_key, argp + table, common.types))) {
		kfree(state);
		return ERR_PTR(-EFAULT);
	}
	return state;
}

static void tun_hash_look(const TUN_HASH_STATE *state, struct tun_hash_view *view)
{
	view->report = state->common.flags & TUN_VNET_HASH_REPORT;
	view->rss = state->common.flags & TUN_VNET_HASH_RSS;
	view->types = state->common.types;
	view->mask = state->rss.indirection_table_mask;
	view->unclassified = state->rss.unclassified_queue;
	view->key = state->rss_key;
	view->table = state->rss_indirection_table;
}

#endif /* TUN_HASH_V4_H */
