# docker build -t fastcr .
# docker run --gpus all --shm-size 8g -v "$PWD:/data" fastcr train folder --data.root images
# Written without Docker at hand: nobody has built it yet.
FROM python:3.12-slim
# what Triton and torch.compile compile with
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY kernels kernels
COPY fastcr fastcr
RUN pip install --no-cache-dir ".[dali,demo]"
WORKDIR /data
ENTRYPOINT ["fastcr"]
