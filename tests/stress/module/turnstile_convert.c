// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Converts pages between private and shared through the kernel's own interface, and checks what
 * is in them after each step.
 *
 * A file opened on /dev/turnstile-convert owns one naturally aligned block of 2 MiB. Each write(2)
 * of "FIRST PAGES SEED" runs one cycle on PAGES pages (of 4 KiB) from page FIRST of the block:
 *
 *   set_memory_decrypted: the range becomes shared. The pages beside it are untouched.
 *   The shared range can be written and reads back what was written.
 *   set_memory_encrypted: the range is private again, and all of it reads as zeros: the paravisor
 *   scrubs what it accepts. The pages beside it are untouched.
 *
 * Every private page otherwise holds words derived from its address and a seed. A cycle in which a
 * word was wrong fails with EIO and names the first one in the kernel log. read(2) gives the
 * counters of all files since the module was loaded, as one line of NAME=VALUE words.
 *
 * set_memory_decrypted() is what dma_alloc_coherent(), SWIOTLB and Hyper-V's rings use; it splits
 * the kernel's direct map, changes the page state with the host and calls PVALIDATE.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/fs.h>
#include <linux/gfp.h>
#include <linux/kernel.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pfn.h>
#include <linux/sched.h>
#include <linux/set_memory.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#define BLOCK_ORDER 9
#define BLOCK_PAGES (1u << BLOCK_ORDER)
#define WORDS_PER_PAGE (PAGE_SIZE / sizeof(u64))
/* Pages on each side of a range that every cycle compares; every WIDE_EVERY-th compares them all. */
#define NEAR_PAGES 8
#define WIDE_EVERY 8
/* Longest command: three decimal numbers, two spaces, LF and NUL. */
#define COMMAND_MAX 64

/* One opened file. */
struct block {
	struct mutex lock; /* one cycle at a time */
	struct page *pages;
	u64 *words;
	u64 seed; /* of what all private pages hold */
	u64 cycles;
	bool lost; /* a conversion failed half-way: the block must never go back to the kernel */
};

static atomic64_t to_shared_calls, to_shared_pages;
static atomic64_t to_private_calls, to_private_pages;
static atomic64_t words_checked, words_wrong, failed_calls;

/* The word at index `at` of a block under `seed`; never zero. */
static u64 expected(const struct block *b, u64 seed, size_t at)
{
	u64 x = (seed ^ (u64)(uintptr_t)(b->words + at)) * 0x9e3779b97f4a7c15ull;

	return (x ^ (x >> 29)) | 1;
}

static void fill(struct block *b, u64 seed, size_t first, size_t pages)
{
	size_t at, end = (first + pages) * WORDS_PER_PAGE;

	for (at = first * WORDS_PER_PAGE; at < end; at++)
		WRITE_ONCE(b->words[at], expected(b, seed, at));
}

/* Compares a range with `seed`'s words, or with zeros; returns how many words are wrong. */
static u64 wrong_words(struct block *b, const char *what, bool zeros, u64 seed, size_t first,
		       size_t pages)
{
	size_t at, end = (first + pages) * WORDS_PER_PAGE;
	u64 wrong = 0;

	for (at = first * WORDS_PER_PAGE; at < end; at++) {
		u64 want = zeros ? 0 : expected(b, seed, at);
		u64 found = READ_ONCE(b->words[at]);

		if (found == want)
			continue;
		if (!wrong)
			pr_err("%s: at %#llx expected %#llx, found %#llx\n", what,
			       (unsigned long long)(PFN_PHYS(page_to_pfn(b->pages)) + at * sizeof(u64)),
			       want, found);
		wrong++;
	}
	atomic64_add(end - first * WORDS_PER_PAGE, &words_checked);
	atomic64_add(wrong, &words_wrong);
	return wrong;
}

/* The pages of the block before and behind the range, at most `reach` on each side. */
static u64 wrong_around(struct block *b, const char *what, size_t first, size_t pages, size_t reach)
{
	size_t behind = first + pages;
	size_t before = min(first, reach);

	return wrong_words(b, what, false, b->seed, first - before, before) +
	       wrong_words(b, what, false, b->seed, behind, min(BLOCK_PAGES - behind, reach));
}

static int cycle(struct block *b, size_t first, size_t pages, u64 seed)
{
	unsigned long address = (unsigned long)(b->words + first * WORDS_PER_PAGE);
	size_t reach = b->cycles++ % WIDE_EVERY ? NEAR_PAGES : BLOCK_PAGES;
	u64 wrong;
	int error;

	wrong = wrong_words(b, "private, before", false, b->seed, first, pages);

	error = set_memory_decrypted(address, pages);
	if (error) {
		pr_err("set_memory_decrypted(%zu pages): %d\n", pages, error);
		goto lost;
	}
	atomic64_inc(&to_shared_calls);
	atomic64_add(pages, &to_shared_pages);
	wrong += wrong_around(b, "beside a shared range", first, pages, reach);
	fill(b, seed, first, pages);
	cond_resched();
	wrong += wrong_words(b, "shared", false, seed, first, pages);

	error = set_memory_encrypted(address, pages);
	if (error) {
		pr_err("set_memory_encrypted(%zu pages): %d\n", pages, error);
		goto lost;
	}
	atomic64_inc(&to_private_calls);
	atomic64_add(pages, &to_private_pages);
	wrong += wrong_words(b, "private again", true, 0, first, pages);
	wrong += wrong_around(b, "beside a range that came back", first, pages, reach);
	fill(b, b->seed, first, pages);
	return wrong ? -EIO : 0;

lost:
	atomic64_inc(&failed_calls);
	b->lost = true;
	return error;
}

static int convert_open(struct inode *inode, struct file *file)
{
	struct block *b = kzalloc(sizeof(*b), GFP_KERNEL);

	if (!b)
		return -ENOMEM;
	b->pages = alloc_pages(GFP_KERNEL | __GFP_NOWARN, BLOCK_ORDER);
	if (!b->pages) {
		kfree(b);
		return -ENOMEM;
	}
	mutex_init(&b->lock);
	b->words = page_address(b->pages);
	b->seed = page_to_pfn(b->pages);
	fill(b, b->seed, 0, BLOCK_PAGES);
	file->private_data = b;
	return nonseekable_open(inode, file);
}

static int convert_release(struct inode *inode, struct file *file)
{
	struct block *b = file->private_data;

	/* A page whose state is not known is leaked on purpose. */
	if (!b->lost)
		__free_pages(b->pages, BLOCK_ORDER);
	kfree(b);
	return 0;
}

static ssize_t convert_write(struct file *file, const char __user *from, size_t length,
			     loff_t *offset)
{
	struct block *b = file->private_data;
	char command[COMMAND_MAX];
	unsigned int first, pages;
	u64 seed;
	int error;

	if (length >= sizeof(command))
		return -EINVAL;
	if (copy_from_user(command, from, length))
		return -EFAULT;
	command[length] = '\0';
	if (sscanf(command, "%u %u %llu", &first, &pages, &seed) != 3)
		return -EINVAL;
	if (pages == 0 || pages > BLOCK_PAGES || first > BLOCK_PAGES - pages)
		return -ERANGE;

	error = mutex_lock_interruptible(&b->lock);
	if (error)
		return error;
	error = b->lost ? -ENXIO : cycle(b, first, pages, seed);
	mutex_unlock(&b->lock);
	return error ? error : length;
}

static ssize_t convert_read(struct file *file, char __user *to, size_t length, loff_t *offset)
{
	char text[320];
	int size = scnprintf(text, sizeof(text),
			     "to_shared_calls=%lld to_shared_pages=%lld to_private_calls=%lld "
			     "to_private_pages=%lld words_checked=%lld words_wrong=%lld "
			     "failed_calls=%lld\n",
			     atomic64_read(&to_shared_calls), atomic64_read(&to_shared_pages),
			     atomic64_read(&to_private_calls), atomic64_read(&to_private_pages),
			     atomic64_read(&words_checked), atomic64_read(&words_wrong),
			     atomic64_read(&failed_calls));

	return simple_read_from_buffer(to, length, offset, text, size);
}

static const struct file_operations convert_operations = {
	.owner = THIS_MODULE,
	.open = convert_open,
	.release = convert_release,
	.write = convert_write,
	.read = convert_read,
};

static struct miscdevice convert_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "turnstile-convert",
	.fops = &convert_operations,
	.mode = 0600,
};
module_misc_device(convert_device);

MODULE_DESCRIPTION("Converts pages between private and shared, and checks them");
MODULE_LICENSE("Dual MIT/GPL");
