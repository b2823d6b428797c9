//! Scratch.
use vgpu::machine::Config;
use vgpu::rig::Rig;
fn main() {
    let text = std::fs::read_to_string(std::env::args().nth(1).expect("path")).expect("read");
    let module = vgpu::ptx::parse(&text).expect("parse");
    let mut rig = Rig::new(Config::default());
    let loaded = rig.load(&module).expect("load");
    let n = 100_000usize;
    let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let y: Vec<f32> = (0..n).map(|i| 1.0 + i as f32).collect();
    let dx = rig.upload(bytemuck::cast_slice(&x));
    let dy = rig.upload(bytemuck::cast_slice(&y));
    let mut p = Vec::new();
    p.extend(dy.to_le_bytes());
    p.extend(dx.to_le_bytes());
    p.extend(2f32.to_le_bytes());
    p.extend((n as i32).to_le_bytes());
    let t = std::time::Instant::now();
    for _ in 0..50 {
        rig.launch(
            &loaded.kernels["saxpy"],
            [n.div_ceil(256) as u32, 1, 1],
            [256, 1, 1],
            0,
            &p,
        );
    }
    println!("{:?} {:?}", rig.synchronise(), t.elapsed());
    println!(
        "{} G lane-instr, {} M/s",
        rig.machine.world.lane_instructions as f64 / 1e9,
        rig.machine.world.lane_instructions as f64 / 1e6 / t.elapsed().as_secs_f64()
    );
    let out = rig.download(dy, 4 * n);
    let out: &[f32] = bytemuck::cast_slice(&out);
    println!("{:?}", &out[..4]);
    let small: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let dx = rig.upload(bytemuck::cast_slice(&small));
    let d = rig.allocate(4);
    let mut p = Vec::new();
    p.extend(d.to_le_bytes());
    p.extend(dx.to_le_bytes());
    p.extend(1000i32.to_le_bytes());
    rig.launch(&loaded.kernels["sum"], [1, 1, 1], [256, 1, 1], 0, &p);
    println!("{:?}", rig.synchronise());
    println!("{:?}", bytemuck::cast_slice::<u8, f32>(&rig.download(d, 4)));
    for f in rig.findings() {
        println!("{f}");
    }
}
