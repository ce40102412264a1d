# Table 1, RepPoints: CWD. Paper: 42.0 COCO val box AP.
_base_ = "./reppoints_x101-dconv_r50_cwd_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
