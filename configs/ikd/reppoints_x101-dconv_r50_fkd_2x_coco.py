# Table 1, RepPoints: FKD. Paper: 40.6 COCO val box AP.
_base_ = "./reppoints_x101-dconv_r50_fkd_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
