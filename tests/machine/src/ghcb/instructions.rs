//! Events that stand for one instruction of the guest: their registers go to the CPU and back.

use alloc::format;

use protocols::exit_code::ExitCode;
use protocols::ghcb::event::{IoDirection, IoInfo, MSR_READ, MSR_WRITE};
use protocols::ghcb::page::{Field, ValidBitmap};

use super::Cpu;
use super::page::{Exchange, Failure};

/// RAX of a hypercall nobody serves: KVM_ENOSYS as a negative number.
const NO_SUCH_HYPERCALL: u64 = (-1000i64) as u64;

/// Events that stand for one instruction and need only registers.
pub(super) fn serve_instruction(
    code: ExitCode,
    exchange: &mut Exchange,
    cpu: &mut dyn Cpu,
) -> Result<(), Failure> {
    match code {
        ExitCode::READ_DR7 => exchange.put(Field::RAX, cpu.dr7()),
        ExitCode::WRITE_DR7 => {
            let value = exchange.get(Field::RAX, "RAX")?;
            if value >> 32 != 0 {
                return Err(Failure::GeneralProtection);
            }
            cpu.set_dr7(value);
        }
        ExitCode::RDTSC | ExitCode::RDTSCP => {
            let tsc = cpu.rdtsc();
            put_pair(exchange, tsc);
            if code == ExitCode::RDTSCP {
                exchange.put(Field::RCX, u64::from(cpu.tsc_aux()));
            }
        }
        ExitCode::RDPMC => {
            let counter = exchange.get(Field::RCX, "RCX")? as u32;
            let value = cpu.rdpmc(counter).ok_or(Failure::GeneralProtection)?;
            put_pair(exchange, value);
        }
        ExitCode::CPUID => serve_cpuid(exchange, cpu)?,
        ExitCode::MSR => {
            let msr = exchange.get(Field::RCX, "RCX")? as u32;
            match exchange.info_1()? {
                MSR_READ => {
                    let value = cpu.rdmsr(msr).ok_or(Failure::GeneralProtection)?;
                    put_pair(exchange, value);
                }
                MSR_WRITE => {
                    let low = exchange.get(Field::RAX, "RAX")? & 0xFFFF_FFFF;
                    let high = exchange.get(Field::RDX, "RDX")? << 32;
                    if !cpu.wrmsr(msr, high | low) {
                        return Err(Failure::GeneralProtection);
                    }
                }
                other => return Err(Failure::input(format!("MSR request {other:#x}"))),
            }
        }
        ExitCode::VMMCALL => {
            exchange.get(Field::RAX, "RAX")?;
            if !exchange
                .request
                .valid_bitmap
                .contains_bit(ValidBitmap::CPL_BIT)
            {
                return Err(Failure::missing("CPL"));
            }
            exchange.put(Field::RAX, NO_SUCH_HYPERCALL);
        }
        ExitCode::MONITOR => {
            exchange.get(Field::RAX, "RAX")?;
            exchange.get(Field::RCX, "RCX")?;
            exchange.get(Field::RDX, "RDX")?;
        }
        ExitCode::MWAIT => {
            exchange.get(Field::RAX, "RAX")?;
            exchange.get(Field::RCX, "RCX")?;
        }
        // WBINVD and INVD: the host writes back; it never throws dirty lines away.
        _ => cpu.wbinvd(),
    }
    Ok(())
}

fn put_pair(exchange: &mut Exchange, value: u64) {
    exchange.put(Field::RAX, value & 0xFFFF_FFFF);
    exchange.put(Field::RDX, value >> 32);
}

fn serve_cpuid(exchange: &mut Exchange, cpu: &mut dyn Cpu) -> Result<(), Failure> {
    const EXTENDED_STATE: u32 = 0xD;
    let leaf = exchange.get(Field::RAX, "RAX")? as u32;
    let subleaf = exchange.get(Field::RCX, "RCX")? as u32;
    if leaf == EXTENDED_STATE {
        exchange.get(Field::XCR0, "XCR0")?;
        if subleaf == 1 {
            exchange.get(Field::XSS, "XSS")?;
        }
    }
    let [eax, ebx, ecx, edx] = cpu.cpuid(leaf, subleaf).map(u64::from);
    exchange.put(Field::RAX, eax);
    exchange.put(Field::RBX, ebx);
    exchange.put(Field::RCX, ecx);
    exchange.put(Field::RDX, edx);
    Ok(())
}

/// IN, OUT, INS and OUTS. String data lies in the shared buffer, as many elements as SW_EXITINFO2
/// says.
pub(super) fn serve_port(exchange: &mut Exchange, cpu: &mut dyn Cpu) -> Result<(), Failure> {
    let info = IoInfo(exchange.info_1()?);
    let width = info
        .width()
        .ok_or_else(|| Failure::input(format!("IOIO exit info 1 = {:#x}", info.0)))?;
    let bytes = width as u8;
    let len = usize::from(bytes);
    let (port, input) = (info.port(), info.direction() == IoDirection::In);
    if !info.is_string() {
        let mask = u64::MAX >> (64 - 8 * u32::from(bytes));
        if input {
            exchange.put(Field::RAX, u64::from(cpu.io_in(port, bytes)) & mask);
        } else {
            let value = exchange.get(Field::RAX, "RAX")?;
            cpu.io_out(port, bytes, (value & mask) as u32);
        }
        return Ok(());
    }
    let count = exchange.info_2()?;
    let total = usize::try_from(count)
        .ok()
        .and_then(|count| count.checked_mul(len));
    let total = total.ok_or_else(|| Failure::input(format!("{count:#x} string elements")))?;
    let offset = exchange.scratch(total)?;
    for at in (offset..offset + total).step_by(len) {
        if input {
            let value = cpu.io_in(port, bytes).to_le_bytes();
            exchange.write_buffer(at, &value[..len]);
        } else {
            let mut value = [0; 4];
            let data = exchange.buffer(at, len).unwrap_or_default();
            value[..data.len()].copy_from_slice(data);
            cpu.io_out(port, bytes, u32::from_le_bytes(value));
        }
    }
    Ok(())
}
