"""mmcv's block k times, timed on request: PYTHON mmcv_worker.py '{"images": 16, …}', then a line for each request.

Requests: ready, forward, both, memory; each is answered by a line of JSON (null where mmcv is not there).
"""

import json
import sys

import torch
from measure import extra_bytes, milliseconds  # type: ignore[import-not-found]  # beside this script


def main() -> None:
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case['threads'])
    device, dtype = torch.device('cuda' if torch.cuda.is_available() else 'cpu'), getattr(torch, case['dtype'])
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print
    try:
        from mmcv.cnn import NonLocal2d
    except ImportError as error:
        print(error)
        print('null', file=answers, flush=True)
        return
    blocks = (NonLocal2d(case['channels'], mode='embedded_gaussian', zeros_init=False) for _ in range(case['k']))
    module = torch.nn.Sequential(*blocks).to(device).to(memory_format=torch.channels_last)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    shape = case['images'], case['channels'], case['side'], case['side']
    x, dz = (torch.randn(shape, device=device).to(dtype).to(memory_format=torch.channels_last) for _ in range(2))
    wanted = [x.requires_grad_(), *module.parameters()]

    def forward() -> torch.Tensor:
        with autocast, torch.no_grad():
            return module(x)

    def both() -> list[torch.Tensor]:
        with autocast:
            z = module(x)
        return [z, *torch.autograd.grad(z, wanted, dz.to(z.dtype))]

    for line in sys.stdin:
        what, repeats = line.strip(), 10 if device.type == 'cuda' else 1
        if what == 'ready':
            both()
            answer = 'ready'
        elif what == 'memory':
            answer = extra_bytes(both, device)
        else:
            answer = milliseconds({'forward': forward, 'both': both}[what], device, repeats)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == '__main__':
    main()
