# RepPoints: structural KD. Published: not known (the paper, as others cite it: 3.3 AP more than the student alone).
_base_ = "./reppoints_x101-dconv_r50_ssim_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
