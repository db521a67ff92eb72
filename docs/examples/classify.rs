// Prints the five best classes of a picture, a PPM file with 8 bits (P6). docs/deploy.md says how to compile this.
use std::ffi::{c_char, c_void, CStr, CString};
use std::process::exit;

#[repr(C)]
struct Tensor {
    data: *mut c_void,
    kind: i32,
    rank: i32,
    shape: [i64; 8],
    strides: *const i64,
    name: *const c_char,
}

#[link(name = "dsr")]
extern "C" {
    fn dsr_open(path: *const c_char, threads: i32) -> *mut c_void;
    fn dsr_input(plan: *const c_void, index: i32) -> Tensor;
    fn dsr_output(plan: *const c_void, index: i32) -> Tensor;
    fn dsr_text(plan: *const c_void, name: *const c_char) -> *const c_char;
    fn dsr_run(plan: *mut c_void, x: *const Tensor, inputs: i32, y: *const Tensor, outputs: i32) -> i32;
    fn dsr_close(plan: *mut *mut c_void);
    fn dsr_last_error() -> *const c_char;
}

fn fail(why: &str) -> ! {
    eprintln!("classify: {why}");
    exit(1)
}

/// What the library said about its last failure.
fn reason() -> String {
    unsafe { CStr::from_ptr(dsr_last_error()) }.to_string_lossy().into_owned()
}

/// A text of the plan; empty if it has none of that name.
fn text(plan: *const c_void, name: &str) -> String {
    let found = unsafe { dsr_text(plan, CString::new(name).unwrap().as_ptr()) };
    if found.is_null() { String::new() } else { unsafe { CStr::from_ptr(found) }.to_string_lossy().into_owned() }
}

/// Size and bytes of a picture.
fn read_ppm(path: &str) -> Option<(i64, i64, Vec<u8>)> {
    let bytes = std::fs::read(path).ok()?;
    let mut fields = Vec::new();
    let mut at = 0;
    while fields.len() < 4 {
        let end = at + bytes[at..].iter().position(|b| b.is_ascii_whitespace())?;
        fields.push(std::str::from_utf8(&bytes[at..end]).ok()?);
        at = end + 1;
    }
    let (width, height): (usize, usize) = (fields[1].parse().ok()?, fields[2].parse().ok()?);
    let size = width.checked_mul(height)?.checked_mul(3)?;
    if fields[0] != "P6" || fields[3] != "255" || size == 0 || bytes.len() - at < size {
        return None;
    }
    Some((width as i64, height as i64, bytes[at..at + size].to_vec()))
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, path, picture] = &arguments[..] else { fail("give a plan and a picture") };
    let path = CString::new(path.as_str()).unwrap();
    let mut plan = unsafe { dsr_open(path.as_ptr(), 1) };
    if plan.is_null() {
        fail(&reason());
    }
    let (mut x, mut y) = unsafe { (dsr_input(plan, 0), dsr_output(plan, 0)) };
    if x.rank != 4 || x.shape[0] != 1 || x.shape[1] != 3 || y.rank != 2 {
        fail("the plan is not for one picture of three channels; export a classifier with --batch 1");
    }
    let Some((width, height, rgb)) = read_ppm(picture) else { fail("the picture is no whole PPM file with 8 bits") };

    // The short side is resized to `resize`, and the centre is cut out.
    let numbers = |name| text(plan, name).split(' ').map(|one| one.parse().unwrap()).collect::<Vec<f32>>();
    let (mean, deviation, resize) = (numbers("mean"), numbers("std"), numbers("resize")[0]);
    let (rows, columns) = (x.shape[2], x.shape[3]);
    let scale = width.min(height) as f32 / if resize > 0.0 { resize } else { rows.min(columns) as f32 };
    let centre = |i: i64, size: i64, of: i64| (i as f32 + 0.5 - size as f32 / 2.0) * scale + of as f32 / 2.0 - 0.5;
    let mut pixels = Vec::new();
    for c in 0..3 {
        let at = |v: f32, u: f32| {
            let (row, column) = ((v as i64).clamp(0, height - 1), (u as i64).clamp(0, width - 1));
            f32::from(rgb[(3 * (row * width + column)) as usize + c]) / 255.0
        };
        for i in 0..rows * columns {
            let (v, u) = (centre(i / columns, rows, height), centre(i % columns, columns, width));
            let (r, k) = (v.floor(), u.floor());
            let upper = at(r, k) + (u - k) * (at(r, k + 1.0) - at(r, k));
            let lower = at(r + 1.0, k) + (u - k) * (at(r + 1.0, k + 1.0) - at(r + 1.0, k));
            pixels.push((upper + (v - r) * (lower - upper) - mean[c]) / deviation[c]);
        }
    }

    let mut scores = vec![0f32; y.shape[1] as usize];
    (x.data, y.data) = (pixels.as_mut_ptr().cast(), scores.as_mut_ptr().cast());
    if unsafe { dsr_run(plan, &x, 1, &y, 1) } != 0 {
        fail(&reason());
    }
    let highest = scores.iter().copied().fold(f32::MIN, f32::max);
    let total: f32 = scores.iter().map(|score| (score - highest).exp()).sum();
    let mut best: Vec<usize> = (0..scores.len()).collect();
    best.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    for &i in best.iter().take(5) {
        println!("{:.4}  {i}  {}", (scores[i] - highest).exp() / total, text(plan, &format!("label/{i}")));
    }
    unsafe { dsr_close(&mut plan) };
}
