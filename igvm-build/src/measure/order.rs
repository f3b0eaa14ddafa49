//! The order in which QEMU launches what a file asks for (`backends/igvm.c`).
//!
//! Pages that continue each other, in the file and in memory and in kind, are collected into a run; the
//! run is launched when a page comes that does not continue it, or at the end. A parameter insert is
//! launched at once, so it overtakes the run before it. (The machine in `tests/machine` has its own
//! version of this, and the two have to agree.)

use igvm_defs::IGVM_VHS_PAGE_DATA;
use protocols::addr::PAGE_SIZE;

use crate::file::{Content, Header};

/// Puts headers into the order in which they are launched.
#[must_use]
pub fn launch_order<'h, 'a>(headers: &[(usize, &'h Header<'a>)]) -> Vec<&'h Header<'a>> {
    let mut ordered = Vec::with_capacity(headers.len());
    let mut run: Vec<&Header<'_>> = Vec::new();
    let mut last: Option<(usize, &IGVM_VHS_PAGE_DATA)> = None;
    for &(index, header) in headers {
        let Content::Page(page) = &header.content else {
            ordered.push(header);
            continue;
        };
        if !last.is_some_and(|(last_index, last)| last_index + 1 == index && continues(last, page))
        {
            ordered.append(&mut run);
        }
        run.push(header);
        last = Some((index, page));
    }
    ordered.append(&mut run);
    ordered
}

fn continues(last: &IGVM_VHS_PAGE_DATA, page: &IGVM_VHS_PAGE_DATA) -> bool {
    last.gpa.checked_add(PAGE_SIZE) == Some(page.gpa)
        && last.flags == page.flags
        && last.data_type == page.data_type
        && last.compatibility_mask == page.compatibility_mask
}

#[cfg(test)]
mod tests {
    use igvm_defs::{
        IGVM_VHS_PARAMETER_INSERT, IgvmPageDataFlags, IgvmPageDataType,
        IgvmVariableHeaderType as Type,
    };

    use super::*;

    fn page(gpa: u64) -> Header<'static> {
        header(Content::Page(IGVM_VHS_PAGE_DATA {
            gpa,
            compatibility_mask: 1,
            file_offset: 0,
            flags: IgvmPageDataFlags::new(),
            data_type: IgvmPageDataType::NORMAL,
            reserved: 0,
        }))
    }

    fn insert(gpa: u64) -> Header<'static> {
        header(Content::Insert(IGVM_VHS_PARAMETER_INSERT {
            gpa,
            compatibility_mask: 1,
            parameter_area_index: 0,
        }))
    }

    fn header(content: Content) -> Header<'static> {
        Header {
            offset: 0,
            kind: Type::IGVM_VHT_PAGE_DATA,
            body: &[],
            content,
        }
    }

    /// Addresses in launch order.
    fn order(headers: &[Header<'_>]) -> Vec<u64> {
        let numbered: Vec<_> = headers.iter().enumerate().collect();
        launch_order(&numbered)
            .into_iter()
            .map(|header| match &header.content {
                Content::Page(page) => page.gpa,
                Content::Insert(insert) => insert.gpa,
                _ => 0,
            })
            .collect()
    }

    #[test]
    fn inserts_first_means_the_order_of_the_file() {
        let file = [insert(0x9000), page(0x1000), page(0x2000), page(0x8000)];
        assert_eq!(order(&file), [0x9000, 0x1000, 0x2000, 0x8000]);
    }

    #[test]
    fn an_insert_overtakes_the_run_before_it_and_nothing_else() {
        let file = [page(0x1000), page(0x2000), insert(0x9000)];
        assert_eq!(order(&file), [0x9000, 0x1000, 0x2000]);
        let file = [page(0x1000), page(0x3000), insert(0x9000)];
        assert_eq!(order(&file), [0x1000, 0x9000, 0x3000]);
        let file = [page(0x1000), insert(0x9000), page(0x2000)];
        assert_eq!(order(&file), [0x9000, 0x1000, 0x2000]);
    }
}
