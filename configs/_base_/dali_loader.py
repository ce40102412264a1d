# NVIDIA DALI as the training loader. Two bases may not both set train_dataloader (mmengine refuses it). So this one gives its
# settings another name, and your config puts them over those of its other base, whose data set, sampler and workers stay:
#     _base_ = ["./my_config.py", "PATH/_base_/dali_loader.py"]
#     train_dataloader = _base_.dali_loader
# PATH: python -c "import ikd_fast.configs as c; print(c.__path__[0])". docs/dali.md has what pipelines it follows.
dali_loader = dict(
    type="DALIDetLoader",
    # DALI's CPU threads, beside the num_workers processes that read files and annotations. On a GPU they only prepare its decoding.
    threads=2,
    # None: on a CPU cv2, whose pixels are those of mmdet's loader to the bit; on a GPU DALI. By name: "cv2" (CPU only) or "dali".
    resizer=None,
    # Batches that DALI works ahead; each takes its images' memory, on a GPU the GPU's.
    prefetch=2,
    # "skip" leaves out files that cannot be read or decoded, names them in the log and counts them; "raise" stops at the first.
    on_error="raise",
)
