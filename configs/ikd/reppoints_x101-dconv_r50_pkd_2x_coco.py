# RepPoints: PKD. Published: 42.3 (mmrazor).
_base_ = "./reppoints_x101-dconv_r50_pkd_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
