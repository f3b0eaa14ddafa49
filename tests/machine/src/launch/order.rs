//! The order in which QEMU's loader launches what a file asks for.
//!
//! It is not the order of the file (QEMU `backends/igvm.c`): adjacent pages of one kind are
//! collected into a run that is launched when a page comes that does not continue it, or at
//! the end. Parameter inserts are launched at once, so an insert behind a run of pages is
//! launched, and measured, *before* them. VMSAs come last of all, because KVM measures them
//! when the launch is finished.

use alloc::vec::Vec;

use super::file::{Directive, PageKind};
use crate::types::PAGE_SIZE;

/// Puts `directives` into the order in which they are done.
pub fn launch_order<'a>(directives: &[Directive<'a>]) -> Vec<Directive<'a>> {
    let mut ordered = Vec::with_capacity(directives.len());
    let mut run: Vec<(usize, Directive<'a>)> = Vec::new();
    let mut contexts = Vec::new();
    for (index, directive) in directives.iter().enumerate() {
        match directive {
            Directive::Page { .. } => {
                if !run
                    .last()
                    .is_some_and(|last| continues(last, index, directive))
                {
                    ordered.extend(run.drain(..).map(|(_, page)| page));
                }
                run.push((index, *directive));
            }
            Directive::Context { .. } => contexts.push(*directive),
            _ => ordered.push(*directive),
        }
    }
    ordered.extend(run.into_iter().map(|(_, page)| page));
    ordered.extend(contexts);
    ordered
}

/// Whether a page continues the run that ends with `last`: next directive, next address, same
/// kind.
fn continues(last: &(usize, Directive<'_>), index: usize, next: &Directive<'_>) -> bool {
    let (
        last_index,
        Directive::Page {
            gpa: last_gpa,
            kind: last_kind,
        },
    ) = last
    else {
        return false;
    };
    let Directive::Page { gpa, kind } = next else {
        return false;
    };
    last_index + 1 == index
        && last_gpa.checked_add(PAGE_SIZE) == Some(*gpa)
        && same_kind(last_kind, kind)
}

/// Whether two pages are launched by the same kind of request.
const fn same_kind(a: &PageKind<'_>, b: &PageKind<'_>) -> bool {
    matches!(
        (a, b),
        (PageKind::Normal(_), PageKind::Normal(_))
            | (PageKind::Unmeasured(_), PageKind::Unmeasured(_))
            | (PageKind::Secrets, PageKind::Secrets)
            | (PageKind::Cpuid, PageKind::Cpuid)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Gpa;

    const fn page(gpa: u64) -> Directive<'static> {
        Directive::Page {
            gpa: Gpa::new(gpa),
            kind: PageKind::Normal(None),
        }
    }
    const INSERT: Directive<'static> = Directive::Insert {
        gpa: Gpa::new(0x9000),
        index: 0,
    };
    const CONTEXT: Directive<'static> = Directive::Context {
        gpa: Gpa::new(0xF000),
        vp_index: 0,
        vmsa: &[],
    };

    #[test]
    fn inserts_first_means_the_order_of_the_file() {
        let file = [INSERT, page(0x1000), page(0x2000), page(0x8000), CONTEXT];
        assert_eq!(launch_order(&file), file);
    }

    /// `igvm.md` §8, "Page runs".
    #[test]
    fn an_insert_overtakes_the_run_before_it() {
        let file = [page(0x1000), page(0x2000), INSERT];
        assert_eq!(launch_order(&file), [INSERT, page(0x1000), page(0x2000)]);
        // The run ends at the gap; only what is still pending is overtaken.
        let file = [page(0x1000), page(0x3000), INSERT];
        assert_eq!(launch_order(&file), [page(0x1000), INSERT, page(0x3000)]);
    }

    #[test]
    fn a_directive_in_between_ends_a_run() {
        let file = [page(0x1000), INSERT, page(0x2000)];
        assert_eq!(launch_order(&file), [INSERT, page(0x1000), page(0x2000)]);
    }

    #[test]
    fn contexts_are_measured_last() {
        let file = [CONTEXT, page(0x1000)];
        assert_eq!(launch_order(&file), [page(0x1000), CONTEXT]);
    }
}
