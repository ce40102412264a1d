# One gradient at a random start in each step, nothing kept: no host memory and any sampler, for one more forward of the teacher.
_base_ = "./mask-rcnn_cascade-x101-dconv_r50_fgd_ikd_2x_coco.py"
model = dict(
    adv=dict(attack=dict(_delete_=True, type="OnlineDIFGSM", mode="single")), augment=dict(crop_align=1)
)
train_dataloader = dict(sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True))
